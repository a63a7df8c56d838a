// Kernels: registered with their library, launched by the million, and never run.
#include "common.h"

#include <cstring>

using standin::launched;

STANDIN_API void** __cudaRegisterFatBinary(void*) {
  static void* handle[4];
  return handle;
}
STANDIN_API void __cudaRegisterFatBinaryEnd(void**) {}
STANDIN_API void __cudaUnregisterFatBinary(void**) {}
STANDIN_API char __cudaInitModule(void**) { return 1; }
STANDIN_API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
STANDIN_API unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
STANDIN_API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared,
                                                   void* stream) {
  // Their values reach only functions of this file, which ignore them.
  *grid = *block = dim3{1, 1, 1};
  *shared = 0;
  *static_cast<void**>(stream) = nullptr;
  return cudaSuccess;
}
STANDIN_API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

STANDIN_API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t,
                                           cudaStream_t) {
  launched(kernel);
  return cudaSuccess;
}
STANDIN_API cudaError_t cudaLaunchKernel(const void* function, dim3, dim3, void**, size_t,
                                         cudaStream_t) {
  launched(function);
  return cudaSuccess;
}
STANDIN_API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* function,
                                            void**) {
  launched(function);
  return cudaSuccess;
}
STANDIN_API cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3, dim3, void**,
                                                    size_t, cudaStream_t) {
  launched(function);
  return cudaSuccess;
}

// What libraries ask before they choose the size of a launch.
STANDIN_API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->ptxVersion = a->binaryVersion = 90;
  a->maxDynamicSharedSizeBytes = 232448;
  return cudaSuccess;
}
STANDIN_API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* number, const void*,
                                                                      int, size_t) {
  *number = 2;
  return cudaSuccess;
}
STANDIN_API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* number, const void*, int, size_t, unsigned) {
  *number = 2;
  return cudaSuccess;
}
STANDIN_API cudaError_t cudaOccupancyMaxActiveClusters(int* number, const void*,
                                                       const cudaLaunchConfig_t*) {
  *number = 66;
  return cudaSuccess;
}
STANDIN_API cudaError_t cudaOccupancyMaxPotentialClusterSize(int* number, const void*,
                                                             const cudaLaunchConfig_t*) {
  *number = 8;
  return cudaSuccess;
}
STANDIN_API cudaError_t cudaGetSymbolAddress(void** pointer, const void*) {
  static char bytes[1 << 16];
  *pointer = bytes;
  return cudaSuccess;
}
