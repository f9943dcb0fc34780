// The part of NVML that counts devices, in an object of its own because its soname is another.
// torch.cuda.device_count() asks NVML first, and on a machine with a GPU would find the real one.
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

}  // extern "C"
