// Presets and the environment that chooses among them.
#include "machine.h"

#include <cuda.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace egm_sim {
namespace {

// clang-format off
// Attributes of coherent machines follow the CUDA Programming Guide, "Unified Memory", and NVIDIA's
// description of driver-managed coherent memory (HBM is then no NUMA node and the kernel does not
// place pages there). They were not read off such machines.
constexpr Preset kPresets[] = {
    // name                  device                       n  cc     SMs  HBM  host  EGM page integr concur coher  direct node   driver
    {"h100",                 "Simulated H100 PCIe",       1, 9, 0,  114,  80,  512,   0,  4, false, true,  false, false, false, true},
    {"h200",                 "Simulated H200",            1, 9, 0,  132, 141,  512,   0,  4, false, true,  false, false, false, true},
    {"gh200",                "Simulated GH200",           1, 9, 0,  132,  96,  480,   0, 64, false, true,  true,  true,  true,  true},
    {"gh200-driver-managed", "Simulated GH200",           1, 9, 0,  132,  96,  480,   0, 64, false, true,  true,  true,  false, true},
    {"gh200-egm",            "Simulated GH200",           1, 9, 0,  132,  96,  480, 400, 64, false, true,  true,  true,  true,  true},
    {"gb200",                "Simulated GB200",           2, 10, 0, 148, 186,  480,   0, 64, false, true,  true,  true,  true,  true},
    {"gb10",                 "Simulated GB10",            1, 12, 1,  48, 120,  120,   0,  4, true,  true,  true,  true,  false, true},
    {"no-managed",           "Simulated GPU, no UVM",     1, 9, 0,  132,  80,  512,   0,  4, false, false, false, false, false, true},
    {"no-gpu",               "none",                      0, 0, 0,    0,   0,   64,   0,  4, false, false, false, false, false, true},
    {"no-driver",            "none",                      0, 0, 0,    0,   0,   64,   0,  4, false, false, false, false, false, false},
};
// clang-format on

const Preset& preset_called(const char* name) {
  for (const Preset& preset : kPresets) {
    if (std::strcmp(preset.name, name) == 0) return preset;
  }
  // Loud and final: a test on the wrong machine would prove nothing.
  std::fprintf(stderr, "egm_alloc simulator: EGM_SIM_MACHINE=%s is none of:", name);
  for (const Preset& preset : kPresets) std::fprintf(stderr, " %s", preset.name);
  std::fprintf(stderr, "\n");
  std::_Exit(2);
}

double number(const char* variable, double otherwise) {
  const char* text = std::getenv(variable);
  return text && *text ? std::atof(text) : otherwise;
}

Machine read_environment() {
  const char* name = std::getenv("EGM_SIM_MACHINE");
  const Preset& preset = preset_called(name && *name ? name : "h200");
  Machine machine{};
  machine.preset = &preset;
  machine.devices =
      preset.devices == 0 ? 0 : static_cast<int>(number("EGM_SIM_DEVICES", preset.devices));
  machine.hbm_bytes = static_cast<size_t>(number("EGM_SIM_HBM_GIB", preset.hbm_gib) * kGiB);
  machine.host_bytes = static_cast<size_t>(number("EGM_SIM_HOST_GIB", preset.host_gib) * kGiB);
  machine.egm_bytes = static_cast<size_t>(number("EGM_SIM_EGM_GIB", preset.egm_gib) * kGiB);
  machine.host_nodes = std::max(1, static_cast<int>(number("EGM_SIM_HOST_NODES", 1)));
  machine.peer_access = number("EGM_SIM_PEER_ACCESS", 1) != 0;
  machine.host_numa_vmm = number("EGM_SIM_HOST_NUMA_VMM", 1) != 0;
  machine.registered_at_host_address = number("EGM_SIM_REGISTERED_AT_HOST_ADDRESS", 1) != 0;
  return machine;
}

}  // namespace

Machine& machine() {
  static Machine instance = read_environment();
  return instance;
}

int device_node(int device) {
  return machine().preset->hbm_is_node ? machine().host_nodes + device : -1;
}

int host_node_of(int device) {
  return device * machine().host_nodes / std::max(1, machine().devices);
}

std::string location_text(int type, int id) {
  switch (type) {
    case CU_MEM_LOCATION_TYPE_DEVICE:
      return "device:" + std::to_string(id);
    case CU_MEM_LOCATION_TYPE_HOST:
      return "host";
    case CU_MEM_LOCATION_TYPE_HOST_NUMA:
      return "host-numa:" + std::to_string(id);
    case CU_MEM_LOCATION_TYPE_HOST_NUMA_CURRENT:
      return "host-numa-current";
    default:
      return "none";
  }
}

}  // namespace egm_sim
