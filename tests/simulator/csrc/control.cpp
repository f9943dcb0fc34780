// The control interface that tests use through ctypes (sim.py). Nothing of CUDA's own is here.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "api.h"
#include "machine.h"
#include "managed.h"
#include "memory.h"
#include "streams.h"
#include "vmm.h"

namespace egm_sim {

int refuse_unsimulated(const char* name) {
  return api<int>(name, kPlain, {}, [](Call&) { return cudaErrorNotSupported; });
}

namespace {

// A text for Python, who gives it back to egm_sim_free_text.
char* hand_over(const std::string& text) { return strdup(text.c_str()); }

void count(std::string& out, const char* kind, int device, size_t number, size_t bytes) {
  if (number == 0) return;
  out += std::string(kind) + " " + std::to_string(device) + " " + std::to_string(number) + " " +
         std::to_string(bytes) + "\n";
}

}  // namespace
}  // namespace egm_sim

using namespace egm_sim;

extern "C" {

void egm_sim_free_text(char* text) { std::free(text); }

int egm_sim_fail_call(const char* name, const char* error, long nth, long times) {
  const int number = error_number(error);
  if (number <= 0) return -1;
  return arm_fault(name, number, nth, times);
}
void egm_sim_disarm_fault(int fault) { disarm_fault(fault); }
void egm_sim_disarm_all_faults() { disarm_all_faults(); }
long egm_sim_faults_fired(int fault) { return faults_fired(fault); }
void egm_sim_count_calls(int on) { count_calls(on != 0); }
long egm_sim_calls_counted() { return calls_counted(); }

void egm_sim_start_log(int everything, size_t limit) { start_log(everything != 0, limit); }
void egm_sim_stop_log() { stop_log(); }
char* egm_sim_take_log() { return hand_over(take_log()); }

int egm_sim_hold(uintptr_t stream, int all, int on) {
  Locked locked;
  return hold_stream(reinterpret_cast<cudaStream_t>(stream), all != 0, on != 0) ? 0 : -1;
}

int egm_sim_devices() { return machine().devices; }
int egm_sim_has_driver() { return machine().preset->has_driver ? 1 : 0; }
const char* egm_sim_machine() { return machine().preset->name; }
size_t egm_sim_host_bytes() { return machine().host_bytes; }
size_t egm_sim_egm_bytes() { return machine().egm_bytes; }
int egm_sim_host_nodes() { return machine().host_nodes; }
int egm_sim_host_page_kib() { return machine().preset->host_page_kib; }

int egm_sim_set_hbm(int device, size_t bytes) {
  Locked locked;
  if (!device_exists(device)) return -1;
  Hbm& h = hbm(device);
  h.capacity = bytes;
  if (h.taken + h.resident > bytes) evict(device, h.taken + h.resident - bytes, nullptr);
  return 0;
}
void egm_sim_set_peer_access(int on) {
  Locked locked;
  machine().peer_access = on != 0;
}

// capacity, taken, resident, evicted
int egm_sim_hbm(int device, size_t out[4]) {
  Locked locked;
  if (!device_exists(device)) return -1;
  const Hbm& h = hbm(device);
  out[0] = h.capacity;
  out[1] = h.taken;
  out[2] = h.resident;
  out[3] = h.evicted;
  return 0;
}

// total, taken
int egm_sim_host_numa(int node, size_t out[2]) {
  Locked locked;
  const HostNode* found = host_node(node);
  if (!found) return -1;
  out[0] = found->total;
  out[1] = found->taken;
  return 0;
}
int egm_sim_set_host_numa(int node, size_t bytes) {
  Locked locked;
  HostNode* found = host_node(node);
  if (!found) return -1;
  found->total = bytes;
  return 0;
}
size_t egm_sim_reserved_bytes() {
  Locked locked;
  return reserved_bytes();
}

long egm_sim_unmapped_while_busy() {
  Locked locked;
  return unmapped_while_busy();
}
void egm_sim_forget_unmappings() {
  Locked locked;
  forget_unmappings();
}

// Bytes of managed memory in [address, address + size) that are at `where` (a device, -1 for the
// host, -2 for nowhere yet); chunks count whole. -1 if the address is not managed memory.
long long egm_sim_resident(uintptr_t address, size_t size, int where) {
  Locked locked;
  const ChunkRange range = chunks_of(reinterpret_cast<void*>(address), size);
  if (!range.allocation) return -1;
  refresh(range);
  const uintptr_t base = range.allocation->base;
  size_t bytes = 0;
  for (size_t i = range.first; i < range.last; ++i) {
    if (range.allocation->pages->chunks[i].where != where) continue;
    const uintptr_t start = std::max<uintptr_t>(address, base + i * kChunk);
    const uintptr_t end =
        std::min<uintptr_t>(address + size, base + i * kChunk + chunk_bytes(*range.allocation, i));
    bytes += end - start;
  }
  return static_cast<long long>(bytes);
}

// What a kernel of `by` (a device, or -1 for the CPU) would do to residency.
void egm_sim_touch(uintptr_t address, size_t size, int by) {
  Locked locked;
  touch(reinterpret_cast<void*>(address), size, by);
}

// One line "kind device number bytes" for each kind of allocation that is alive.
char* egm_sim_live() {
  Locked locked;
  std::string out;
  for (int kind = 0; kind < kKinds; ++kind) {
    for (int device = 0; device < machine().devices; ++device) {
      size_t number = 0, bytes = 0;
      for (const auto& [base, allocation] : allocations()) {
        if (static_cast<int>(allocation->kind) != kind || allocation->device != device) continue;
        ++number;
        bytes += allocation->size;
      }
      count(out, kind_name(static_cast<Kind>(kind)), device, number, bytes);
    }
  }
  return hand_over(out);
}

}  // extern "C"
