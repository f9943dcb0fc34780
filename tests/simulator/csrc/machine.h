// The machine that is simulated: which devices it has and what they say about themselves. Presets
// and environment only; no memory, no work.
#pragma once

#include <cstddef>
#include <string>

namespace egm_sim {

constexpr size_t kKiB = size_t{1} << 10;
constexpr size_t kMiB = size_t{1} << 20;
constexpr size_t kGiB = size_t{1} << 30;

// One row of the preset table. Sizes are those of the real product; EGM_SIM_* variables override.
struct Preset {
  const char* name;
  const char* device_name;
  int devices;
  int major, minor;
  int multiprocessors;
  int hbm_gib;
  int host_gib;
  // Host memory set aside for the GPU in the BIOS: the kernel does not own it.
  int egm_gib;
  // What the host's kernel calls a page; sizes in the simulated process itself stay the real
  // ones.
  int host_page_kib;
  bool integrated;
  bool concurrent_managed;
  // pageableMemoryAccess and pageableMemoryAccessUsesHostPageTables.
  bool coherent;
  bool direct_host_access;
  // The kernel sees HBM as a NUMA node.
  bool hbm_is_node;
  bool has_driver;
};

struct Machine {
  const Preset* preset;
  int devices;
  size_t hbm_bytes;
  size_t host_bytes;
  size_t egm_bytes;
  // NUMA nodes of CPUs, which host memory and the carve-out are spread over evenly.
  int host_nodes;
  bool peer_access;
  // Whether cuMemCreate can place memory on a host node.
  bool host_numa_vmm;
  // Whether devices reach registered memory at the CPU's own address.
  bool registered_at_host_address;
};

// Read from the environment on first use.
Machine& machine();

// The NUMA node that is this device's memory, or -1; CPU nodes come first.
int device_node(int device);
// The CPU node that a device is attached to.
int host_node_of(int device);

// "device:0", "host", "host-numa:1": how a location reads in the log. The runtime's and the
// driver's types share their numbers.
std::string location_text(int type, int id);

bool device_exists(int device);
// By cudaDeviceAttr or CUdevice_attribute, which share their numbers.
int device_attribute(int which, int device);

}  // namespace egm_sim
