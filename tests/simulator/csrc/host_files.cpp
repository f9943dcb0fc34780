// The simulated machine's host memory, as the kernel would show it: C++ streams and directory
// listings of the files named here read those under EGM_SIM_HOST_ROOT. launch.py writes them.
#include <dirent.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

constexpr const char* kSimulated[] = {
    "/proc/meminfo",         "/proc/self/status", "/proc/self/cgroup", "/proc/self/mountinfo",
    "/sys/devices/system/node", "/sys/fs/cgroup",    "/sys/class/egm",
};

// Where to look instead, or the path itself.
std::string redirected(const char* path) {
  static const char* const root = std::getenv("EGM_SIM_HOST_ROOT");
  if (root != nullptr && path != nullptr) {
    for (const char* prefix : kSimulated) {
      if (std::strncmp(path, prefix, std::strlen(prefix)) == 0) return std::string(root) + path;
    }
  }
  return path == nullptr ? std::string() : std::string(path);
}

template <typename Function>
Function* next(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {

FILE* fopen(const char* path, const char* mode) {
  static const auto real = next<FILE*(const char*, const char*)>("fopen");
  return real(redirected(path).c_str(), mode);
}

FILE* fopen64(const char* path, const char* mode) {
  static const auto real = next<FILE*(const char*, const char*)>("fopen64");
  return real(redirected(path).c_str(), mode);
}

DIR* opendir(const char* path) {
  static const auto real = next<DIR*(const char*)>("opendir");
  return real(redirected(path).c_str());
}

}  // extern "C"
