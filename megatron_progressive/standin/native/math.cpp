// cuBLAS, cuBLASLt and cuDNN: handles, versions, and multiplications that are only counted.
#include "common.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {
// A handle or a descriptor: memory that its owner may write to.
int made(void** handle) {
  *handle = calloc(1, 1024);
  return *handle ? 0 : 1;
}
int gone(void* handle) {
  free(handle);
  return 0;
}
constexpr size_t kHeuristicBytes = 96;  // of a cublasLtMatmulHeuristicResult_t
}  // namespace

STANDIN_API int cublasCreate_v2(void** handle) { return made(handle); }
STANDIN_API int cublasDestroy_v2(void* handle) { return gone(handle); }
STANDIN_API int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0; }
STANDIN_API int cublasGetMathMode(void*, int* mode) { return *mode = 0; }
STANDIN_API const char* cublasGetStatusString(int) { return "status of the stand-in's cuBLAS"; }
STANDIN_API size_t cublasLtGetVersion() { return 130100; }
STANDIN_API int cublasLtCreate(void** handle) { return made(handle); }
STANDIN_API int cublasLtDestroy(void* handle) { return gone(handle); }
STANDIN_API int cublasLtMatmulDescCreate(void** descriptor, int compute, int) {
  // CUBLAS_COMPUTE_32F_FAST_TF32 of cublas_api.h: products of ten bits of mantissa
  if (compute == 77) standin::note("cublaslt_tf32", 1);
  return made(descriptor);
}
STANDIN_API int cublasLtMatmulDescDestroy(void* descriptor) { return gone(descriptor); }
STANDIN_API int cublasLtMatmulPreferenceCreate(void** preference) { return made(preference); }
STANDIN_API int cublasLtMatmulPreferenceDestroy(void* preference) { return gone(preference); }
STANDIN_API int cublasLtMatrixLayoutCreate(void** layout, int, uint64_t, uint64_t, int64_t) {
  return made(layout);
}
STANDIN_API int cublasLtMatrixLayoutDestroy(void* layout) { return gone(layout); }
STANDIN_API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int,
                                               void* results, int* number) {
  memset(results, 0, kHeuristicBytes);
  *number = 1;
  return 0;
}

// Multiplications: the arguments differ, the answer does not.
#define COUNTED(name)            \
  STANDIN_API int name() {       \
    standin::count(#name);       \
    return 0;                    \
  }
COUNTED(cublasLtMatmul)
COUNTED(cublasSgemm_v2)
COUNTED(cublasDgemm_v2)
COUNTED(cublasGemmEx)
COUNTED(cublasSgemmEx)
COUNTED(cublasGemmStridedBatchedEx)
COUNTED(cublasSgemmStridedBatched)
COUNTED(cublasDgemmStridedBatched)
COUNTED(cublasGemmBatchedEx)
COUNTED(cublasSgemv_v2)
COUNTED(cublasDgemv_v2)
COUNTED(cublasSdot_v2)
COUNTED(cublasDotEx)
COUNTED(cudnnBackendExecute)
COUNTED(cudnnConvolutionForward)
COUNTED(cudnnConvolutionBackwardData)
COUNTED(cudnnConvolutionBackwardFilter)

STANDIN_API size_t cudnnGetVersion() {
  return static_cast<size_t>(standin::setting("STANDIN_CUDNN", STANDIN_CUDNN_VERSION));
}
STANDIN_API size_t cudnnGetCudartVersion() { return CUDART_VERSION; }
STANDIN_API int cudnnCreate(void** handle) { return made(handle); }
STANDIN_API int cudnnDestroy(void* handle) { return gone(handle); }
STANDIN_API const char* cudnnGetErrorString(int) { return "status of the stand-in's cuDNN"; }
STANDIN_API int cudnnGetProperty(int type, int* value) {
  const int version = static_cast<int>(cudnnGetVersion());
  *value = type == 0 ? version / 10000 : type == 1 ? version / 100 % 100 : version % 100;
  return 0;
}
STANDIN_API void cudnnGetLastErrorString(char* text, size_t bytes) {
  snprintf(text, bytes, "stand-in");
}
