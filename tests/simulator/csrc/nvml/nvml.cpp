// The part of NVML that counts devices, in an object of its own because its soname is another.
// torch.cuda.device_count() asks NVML first, and on a machine with a GPU would find the real one.
namespace {
constexpr int kNotSupported = 3;
}

extern "C" {

int egm_sim_devices();
int egm_sim_has_driver();

int nvmlInit() {
  constexpr int kDriverNotLoaded = 9;
  return egm_sim_has_driver() ? 0 : kDriverNotLoaded;
}
int nvmlInit_v2() { return nvmlInit(); }
int nvmlShutdown() { return 0; }
int nvmlDeviceGetCount_v2(unsigned* count) {
  *count = static_cast<unsigned>(egm_sim_devices());
  return 0;
}

// c10/cuda/driver_api.cpp looks these up together; an out-of-memory message asks who uses a device.
int nvmlDeviceGetHandleByPciBusId_v2(const char*, void** device) {
  *device = nullptr;
  return 0;
}
int nvmlDeviceGetComputeRunningProcesses(void*, unsigned* count, void*) {
  *count = 0;
  return 0;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void*, unsigned* count, void*) {
  *count = 0;
  return 0;
}
int nvmlDeviceGetNvLinkRemoteDeviceType(void*, unsigned, unsigned*) { return kNotSupported; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void*, unsigned, void*) { return kNotSupported; }
int nvmlSystemGetCudaDriverVersion_v2(int*) { return kNotSupported; }
int nvmlDeviceGetGpuFabricInfoV(void*, void*) { return kNotSupported; }

}  // extern "C"
