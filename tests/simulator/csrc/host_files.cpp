// The simulated machine's host, as the kernel would show it: C++ streams, open(2) and directory
// listings of the files named here go to those under EGM_SIM_HOST_ROOT. launch.py writes them. What
// the processes of the machine share is there too.
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

namespace {

constexpr const char* kSimulated[] = {
    "/proc/meminfo",
    "/proc/self/status",
    "/proc/self/cgroup",
    "/proc/self/mountinfo",
    "/sys/devices/system/node",
    "/sys/fs/cgroup",
    "/sys/class/egm",
    "/sys/module/nvidia/version",
    "/dev/shm/egm_alloc",
    // What this process maps is real, so the size of its huge pages stays that of the real machine.
    "/sys/kernel/mm/transparent_hugepage/enabled",
};

std::mutex& mutex() {
  static auto* const instance = new std::mutex;
  return *instance;
}

// Empty: the real machine's files.
std::string& root() {
  static auto* const instance = [] {
    const char* const configured = std::getenv("EGM_SIM_HOST_ROOT");
    return new std::string(configured == nullptr ? "" : configured);
  }();
  return *instance;
}

// Where to look instead, or the path itself.
std::string redirected(const char* path) {
  for (const char* prefix : kSimulated) {
    if (std::strncmp(path, prefix, std::strlen(prefix)) == 0) {
      std::lock_guard<std::mutex> lock(mutex());
      return root() + path;
    }
  }
  return path;
}

template <typename Function>
Function* next(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {

// Another folder of files for this process.
void egm_sim_set_host_root(const char* path) {
  std::lock_guard<std::mutex> lock(mutex());
  root() = path;
}

FILE* fopen(const char* path, const char* mode) {
  static const auto real = next<FILE*(const char*, const char*)>("fopen");
  return real(redirected(path).c_str(), mode);
}

FILE* fopen64(const char* path, const char* mode) {
  static const auto real = next<FILE*(const char*, const char*)>("fopen64");
  return real(redirected(path).c_str(), mode);
}

int open(const char* path, int flags, ...) {
  static const auto real = next<int(const char*, int, ...)>("open");
  va_list more;
  va_start(more, flags);
  const bool creates = (flags & O_CREAT) != 0 || (flags & O_TMPFILE) == O_TMPFILE;
  const mode_t mode = creates ? va_arg(more, mode_t) : 0;
  va_end(more);
  return real(redirected(path).c_str(), flags, mode);
}

// By which libstdc++ since GCC 12 lists folders, instead of opendir.
int openat(int folder, const char* path, int flags, ...) {
  static const auto real = next<int(int, const char*, int, ...)>("openat");
  va_list more;
  va_start(more, flags);
  const bool creates = (flags & O_CREAT) != 0 || (flags & O_TMPFILE) == O_TMPFILE;
  const mode_t mode = creates ? va_arg(more, mode_t) : 0;
  va_end(more);
  return real(folder, redirected(path).c_str(), flags, mode);
}

DIR* opendir(const char* path) {
  static const auto real = next<DIR*(const char*)>("opendir");
  return real(redirected(path).c_str());
}

}  // extern "C"
