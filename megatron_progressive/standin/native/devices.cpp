// Devices: their number, properties and attributes. All are H100s.
#include "common.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {
thread_local int current = 0;

int devices() {
  static const int number = [] {
    // torchrun and Slurm may leave some visible; only their number matters here.
    const char* visible = getenv("CUDA_VISIBLE_DEVICES");
    const int all = static_cast<int>(standin::setting("STANDIN_DEVICES", 8));
    if (!visible) return all;
    int named = 0;
    for (const char* c = visible; *c; c++) named += c == visible || *c == ',';
    return *visible == 0 || *visible == '-' ? 0 : named < all ? named : all;
  }();
  return number;
}

constexpr int kMultiprocessors = 132, kThreads = 1024, kThreadsOfMultiprocessor = 2048;
constexpr int kShared = 49152, kSharedOptin = 232448, kSharedOfMultiprocessor = 233472;
constexpr int kRegisters = 65536, kL2 = 50 << 20, kVersion = CUDART_VERSION;
}  // namespace

int standin::current_device() { return current; }

STANDIN_API cudaError_t cudaGetDeviceCount(int* number) {
  *number = devices();
  return *number ? cudaSuccess : cudaErrorNoDevice;
}
STANDIN_API cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}
STANDIN_API cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= devices()) return cudaErrorInvalidDevice;
  current = device;
  return cudaSuccess;
}

STANDIN_API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H100 80GB HBM3 (stand-in)");
  p->major = 9;
  p->totalGlobalMem = standin::device_bytes();
  p->multiProcessorCount = kMultiprocessors;
  p->warpSize = 32;
  p->maxThreadsPerBlock = kThreads;
  p->maxThreadsPerMultiProcessor = kThreadsOfMultiprocessor;
  p->sharedMemPerBlock = kShared;
  p->sharedMemPerBlockOptin = kSharedOptin;
  p->sharedMemPerMultiprocessor = kSharedOfMultiprocessor;
  p->regsPerBlock = p->regsPerMultiprocessor = kRegisters;
  p->l2CacheSize = kL2;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = kThreads;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->textureAlignment = 512;
  p->unifiedAddressing = p->canMapHostMemory = p->concurrentKernels = 1;
  p->maxBlocksPerMultiProcessor = 32;
  p->memoryBusWidth = 5120;
  p->managedMemory = p->cooperativeLaunch = 1;
  return cudaSuccess;
}

STANDIN_API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMultiProcessorCount: *value = kMultiprocessors; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = kThreads; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = kThreadsOfMultiprocessor; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = kShared; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = kSharedOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = kSharedOfMultiprocessor; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: *value = kThreads; break;
    case cudaDevAttrMaxBlockDimZ: *value = 64; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = 32; break;
    case cudaDevAttrL2CacheSize: *value = kL2; break;
    default: *value = 1;  // of the rest most are "is supported"
  }
  return cudaSuccess;
}

STANDIN_API cudaError_t cudaDriverGetVersion(int* version) {
  *version = kVersion;
  return cudaSuccess;
}
STANDIN_API cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = kVersion;
  return cudaSuccess;
}
STANDIN_API const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
    default: return "error of the stand-in device";
  }
}
STANDIN_API const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaError";
}
STANDIN_API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
STANDIN_API cudaError_t cudaDeviceGetPCIBusId(char* text, int bytes, int device) {
  snprintf(text, static_cast<size_t>(bytes), "0000:%02x:00.0", device);
  return cudaSuccess;
}
STANDIN_API cudaError_t cudaDeviceCanAccessPeer(int* value, int, int) {
  *value = 1;
  return cudaSuccess;
}

// torch asks the runtime for functions of the driver by name: ours, or one that does nothing.
static int nothing() { return 0; }
STANDIN_API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function,
                                                         unsigned, unsigned long long,
                                                         cudaDriverEntryPointQueryResult* result) {
  static void* driver = dlopen("libcuda.so.1", RTLD_NOW);
  *function = driver ? dlsym(driver, name) : nullptr;
  if (!*function) *function = reinterpret_cast<void*>(nothing);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
