// libnvidia-ml.so.1: as much as torch asks of it, the number of devices. A process that has only
// asked here may still fork.
#include <cstdlib>

#define NVML extern "C" __attribute__((visibility("default"))) int

NVML nvmlInit() { return 0; }
NVML nvmlInit_v2() { return 0; }
NVML nvmlShutdown() { return 0; }
NVML nvmlDeviceGetCount_v2(unsigned* number) {
  const char* value = getenv("STANDIN_DEVICES");
  *number = value && *value ? static_cast<unsigned>(atoi(value)) : 8;
  return 0;
}

// What torch asks when memory runs out: which processes hold how much (none is told), and how
// devices are connected.
NVML nvmlDeviceGetHandleByPciBusId_v2(const char*, void** device) {
  return *device = reinterpret_cast<void*>(0x60), 0;
}
NVML nvmlDeviceGetComputeRunningProcesses(void*, unsigned* number, void*) {
  return *number = 0, 0;
}
NVML nvmlSystemGetCudaDriverVersion_v2(int* version) { return *version = STANDIN_CUDA_VERSION, 0; }
NVML nvmlDeviceGetNvLinkRemoteDeviceType(void*, unsigned, int* type) { return *type = 0; }
NVML nvmlDeviceGetNvLinkRemotePciInfo_v2(void*, unsigned, void*) { return 3; }  // not supported
