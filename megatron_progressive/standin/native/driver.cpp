// libcuda.so.1: what Triton, Transformer Engine and torch ask of the driver by name. A library of
// its own, because they open it by that name. Handles are never looked into.
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>

#define DRIVER extern "C" __attribute__((visibility("default"))) int

namespace {
void* const kContext = reinterpret_cast<void*>(0x50);

// Of the preloaded library, which counts launches.
void count(const char* name) {
  using Count = void (*)(const char*);
  static const auto call = reinterpret_cast<Count>(dlsym(RTLD_DEFAULT, "standin_count"));
  if (call) call(name);
}

int devices() {
  const char* value = getenv("STANDIN_DEVICES");
  return value && *value ? atoi(value) : 8;
}

// CUdevice_attribute of cuda.h, by number.
int attribute(int which) {
  switch (which) {
    case 1: return 1024;     // threads of a block
    case 10: return 32;      // threads of a warp
    case 16: return 132;     // multiprocessors
    case 75: return 9;       // compute capability 9.0
    case 76: return 0;
    case 82: return 65536;   // registers of a multiprocessor
    case 97: return 232448;  // bytes of shared memory that a block may ask for
    default: return 1;
  }
}
}  // namespace

DRIVER cuInit(unsigned) { return 0; }
DRIVER cuDriverGetVersion(int* version) { return *version = STANDIN_CUDA_VERSION, 0; }
DRIVER cuDeviceGetCount(int* number) { return *number = devices(), 0; }
DRIVER cuDeviceGet(int* device, int which) { return *device = which, 0; }
DRIVER cuDeviceGetName(char* name, int bytes, int) {
  strncpy(name, "NVIDIA H100 80GB HBM3 (stand-in)", static_cast<size_t>(bytes));
  return 0;
}
DRIVER cuDeviceGetAttribute(int* value, int which, int) { return *value = attribute(which), 0; }
DRIVER cuCtxGetCurrent(void** context) { return *context = kContext, 0; }
DRIVER cuCtxGetDevice(int* device) { return *device = 0; }
DRIVER cuDevicePrimaryCtxRetain(void** context, int) { return *context = kContext, 0; }
DRIVER cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  if (flags) *flags = 0;
  if (active) *active = 1;
  return 0;
}
DRIVER cuModuleLoadData(void** module, const void*) { return *module = malloc(8), 0; }
DRIVER cuModuleLoadDataEx(void** module, const void*, unsigned, void*, void*) {
  return *module = malloc(8), 0;
}
// A function's handle is its name: a launch is counted under it.
DRIVER cuModuleGetFunction(void** function, void*, const char* name) {
  return *function = strdup(name), 0;
}
DRIVER cuLaunchKernel(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                      unsigned, void*, void**, void**) {
  return count(static_cast<const char*>(function)), 0;
}
DRIVER cuLaunchKernelEx(const void*, void* function, void**, void**) {
  return count(static_cast<const char*>(function)), 0;
}
DRIVER cuFuncGetAttribute(int* value, int which, void*) {
  return *value = which == 0 ? 1024 : which == 4 ? 64 : 0, 0;  // threads of a block; registers
}
DRIVER cuGetErrorString(int, const char** text) { return *text = "stand-in", 0; }
DRIVER cuGetErrorName(int, const char** text) { return *text = "stand-in", 0; }
DRIVER cuPointerGetAttribute(void* value, int which, unsigned long pointer) {
  if (which == 3) return *static_cast<unsigned long*>(value) = pointer, 0;  // as the device sees it
  return *static_cast<int*>(value) = 0;
}
DRIVER cuOccupancyMaxActiveBlocksPerMultiprocessor(int* number, void*, int, unsigned long) {
  return *number = 2, 0;
}
DRIVER cuOccupancyMaxActiveClusters(int* number, void*, const void*) { return *number = 66, 0; }
