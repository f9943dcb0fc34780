// Lets one call of CUDA fail on a real GPU, and counts what is held. Preloaded, it stands before
// the runtime and before the driver's functions that are looked up through it, and passes calls on.
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
// Of what was asked for and not given back: allocations, registrations, addresses, handles.
int held = 0;

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

// `more`: by how much a call that succeeds changes what is held. Calls that give back never fail.
#define PASS(name, real, more)                 \
  if (more >= 0 && fails(#name)) return error; \
  const int status = real(PASSED);             \
  if (status == 0) held += more;               \
  return status;

#define RUNTIME(name, more)                      \
  extern "C" int name(WORDS) {                   \
    static Call* const real = in_runtime(#name); \
    PASS(name, real, more)                       \
  }

RUNTIME(cudaMalloc, 1)
RUNTIME(cudaMallocManaged, 1)
RUNTIME(cudaFree, -1)
RUNTIME(cudaMemAdvise, 0)
RUNTIME(cudaMemPrefetchAsync, 0)
RUNTIME(cudaHostRegister, 1)
RUNTIME(cudaHostUnregister, -1)

#define DRIVER(name, more)     \
  Call* real_##name = nullptr; \
  int instead_of_##name(WORDS) { PASS(name, real_##name, more) }

namespace {
DRIVER(cuMemGetAllocationGranularity, 0)
DRIVER(cuMemAddressReserve, 1)
DRIVER(cuMemAddressFree, -1)
DRIVER(cuMemCreate, 1)
DRIVER(cuMemRelease, -1)
DRIVER(cuMemMap, 0)
DRIVER(cuMemSetAccess, 0)

#define ENTRY(name) {#name, &real_##name, instead_of_##name}

constexpr struct {
  const char* name;
  Call** real;
  Call* instead;
} kDriver[] = {
    ENTRY(cuMemGetAllocationGranularity),
    ENTRY(cuMemAddressReserve),
    ENTRY(cuMemAddressFree),
    ENTRY(cuMemCreate),
    ENTRY(cuMemRelease),
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

int failing_calls_held() { return held; }

// The call that failed; empty if none did.
const char* failing_calls_failed() { return failed; }
}
