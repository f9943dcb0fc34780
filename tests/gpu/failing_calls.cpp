// Lets one call of CUDA fail on a real GPU. Preloaded, it stands before the runtime and before
// the driver's functions that are looked up through it, and passes calls on.
//
// No header of CUDA: every argument of these functions is an integer, a pointer or a structure of
// eight bytes, so eight words carry all of them, whatever they mean.
#include <dlfcn.h>

#include <cstring>

namespace {

using Word = unsigned long;
using Call = int(Word, Word, Word, Word, Word, Word, Word, Word);

int seen = 0;
int fails_at = 0;  // counted from 1; 0 lets all succeed
int error = 0;
const char* failed = "";

Call* in_runtime(const char* name) {
  static void* runtime = dlopen("libcudart.so.13", RTLD_LAZY | RTLD_NOLOAD);
  return reinterpret_cast<Call*>(dlsym(runtime, name));
}

bool fails(const char* name) {
  if (++seen != fails_at) return false;
  failed = name;
  return true;
}

}  // namespace

#define WORDS Word a, Word b, Word c, Word d, Word e, Word f, Word g, Word h
#define PASSED a, b, c, d, e, f, g, h

#define RUNTIME(name)                            \
  extern "C" int name(WORDS) {                   \
    static Call* const real = in_runtime(#name); \
    return fails(#name) ? error : real(PASSED);  \
  }

RUNTIME(cudaMalloc)
RUNTIME(cudaMallocManaged)
RUNTIME(cudaMemAdvise)
RUNTIME(cudaMemPrefetchAsync)
RUNTIME(cudaHostRegister)

#define DRIVER(name)           \
  Call* real_##name = nullptr; \
  int instead_of_##name(WORDS) { return fails(#name) ? error : real_##name(PASSED); }

namespace {
DRIVER(cuMemGetAllocationGranularity)
DRIVER(cuMemAddressReserve)
DRIVER(cuMemCreate)
DRIVER(cuMemMap)
DRIVER(cuMemSetAccess)

#define ENTRY(name) {#name, &real_##name, instead_of_##name}

constexpr struct {
  const char* name;
  Call** real;
  Call* instead;
} kDriver[] = {
    ENTRY(cuMemGetAllocationGranularity),
    ENTRY(cuMemAddressReserve),
    ENTRY(cuMemCreate),
    ENTRY(cuMemMap),
    ENTRY(cuMemSetAccess),
};
}  // namespace

extern "C" {

int cudaGetDriverEntryPointByVersion(const char* name, void** found, Word c, Word d, Word e) {
  static Call* const real = in_runtime("cudaGetDriverEntryPointByVersion");
  const int status =
      real(reinterpret_cast<Word>(name), reinterpret_cast<Word>(found), c, d, e, 0, 0, 0);
  for (const auto& entry : kDriver) {
    if (status == 0 && *found != nullptr && std::strcmp(name, entry.name) == 0) {
      *entry.real = reinterpret_cast<Call*>(*found);
      *found = reinterpret_cast<void*>(entry.instead);
    }
  }
  return status;
}

// Count from here on; the nth call fails with an error, which the runtime and the driver number
// alike.
void failing_calls_arm(int nth, int with_error) {
  seen = 0;
  fails_at = nth;
  error = with_error;
  failed = "";
}

int failing_calls_seen() { return seen; }

// The call that failed; empty if none did.
const char* failing_calls_failed() { return failed; }
}
