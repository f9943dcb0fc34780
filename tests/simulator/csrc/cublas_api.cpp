// cuBLAS and cuBLASLt, as far as libtorch_cuda imports them: handles and settings are kept, every
// computation succeeds and does nothing. No header of cuBLAS is needed; statuses are ints, and
// callers pass more arguments than the stubs name, which the C calling conventions of x86-64 and
// aarch64 allow.
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kSuccess = 0;       // CUBLAS_STATUS_SUCCESS
constexpr int kInvalidValue = 7;  // CUBLAS_STATUS_INVALID_VALUE

struct Handle {
  void* stream = nullptr;
  int math_mode = 0;
  int pointer_mode = 0;
};

int create_opaque(void** out) {
  *out = new char;
  return kSuccess;
}

int destroy_opaque(void* object) {
  delete static_cast<char*>(object);
  return kSuccess;
}

// cublasLtMatmulHeuristicResult_t (cublasLt.h).
struct HeuristicResult {
  uint64_t algorithm[8];
  size_t workspace_bytes;
  int state;
  float waves;
  int reserved[4];
};

}  // namespace

extern "C" {

int cublasCreate_v2(void** handle) {
  *handle = new Handle;
  return kSuccess;
}
int cublasDestroy_v2(void* handle) {
  delete static_cast<Handle*>(handle);
  return kSuccess;
}
int cublasSetStream_v2(Handle* handle, void* stream) {
  handle->stream = stream;
  return kSuccess;
}
int cublasGetStream_v2(Handle* handle, void** stream) {
  *stream = handle->stream;
  return kSuccess;
}
int cublasSetMathMode(Handle* handle, int mode) {
  handle->math_mode = mode;
  return kSuccess;
}
int cublasGetMathMode(Handle* handle, int* mode) {
  *mode = handle->math_mode;
  return kSuccess;
}
int cublasSetPointerMode_v2(Handle* handle, int mode) {
  handle->pointer_mode = mode;
  return kSuccess;
}
int cublasGetPointerMode_v2(Handle* handle, int* mode) {
  *mode = handle->pointer_mode;
  return kSuccess;
}
int cublasGetVersion_v2(void*, int* version) {
  *version = 130000;
  return kSuccess;
}

size_t cublasLtGetVersion() { return 130000; }
int cublasLtCreate(void** handle) { return create_opaque(handle); }
int cublasLtDestroy(void* handle) { return destroy_opaque(handle); }
int cublasLtMatmulDescCreate(void** out) { return create_opaque(out); }
int cublasLtMatmulDescDestroy(void* object) { return destroy_opaque(object); }
int cublasLtMatrixLayoutCreate(void** out) { return create_opaque(out); }
int cublasLtMatrixLayoutDestroy(void* object) { return destroy_opaque(object); }
int cublasLtMatmulPreferenceCreate(void** out) { return create_opaque(out); }
int cublasLtMatmulPreferenceDestroy(void* object) { return destroy_opaque(object); }
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int requested,
                                   HeuristicResult* results, int* found) {
  if (requested < 1) return kInvalidValue;
  std::memset(results, 0, sizeof *results);
  *found = 1;
  return kSuccess;
}
int cublasLtMatmulAlgoCheck(void*, void*, void*, void*, void*, void*, void*,
                            HeuristicResult* result) {
  std::memset(result, 0, sizeof *result);
  return kSuccess;
}

#define SIM_NOTHING(name) \
  int name() { return kSuccess; }
// clang-format off
SIM_NOTHING(cublasCaxpy_v2) SIM_NOTHING(cublasCcopy_v2) SIM_NOTHING(cublasCdotc_v2)
SIM_NOTHING(cublasCdotu_v2) SIM_NOTHING(cublasCgelsBatched) SIM_NOTHING(cublasCgemmBatched)
SIM_NOTHING(cublasCgemmStridedBatched) SIM_NOTHING(cublasCgemm_v2) SIM_NOTHING(cublasCgemv_v2)
SIM_NOTHING(cublasCgeqrfBatched) SIM_NOTHING(cublasCgerc_v2) SIM_NOTHING(cublasCgeru_v2)
SIM_NOTHING(cublasCgetrfBatched) SIM_NOTHING(cublasCgetrsBatched) SIM_NOTHING(cublasChemm_v2)
SIM_NOTHING(cublasChemv_v2) SIM_NOTHING(cublasCher2_v2) SIM_NOTHING(cublasCher2k_v2)
SIM_NOTHING(cublasCher_v2) SIM_NOTHING(cublasCherk_v2) SIM_NOTHING(cublasCrot_v2)
SIM_NOTHING(cublasCrotg_v2) SIM_NOTHING(cublasCscal_v2) SIM_NOTHING(cublasCsrot_v2)
SIM_NOTHING(cublasCsscal_v2) SIM_NOTHING(cublasCswap_v2) SIM_NOTHING(cublasCsymm_v2)
SIM_NOTHING(cublasCsymv_v2) SIM_NOTHING(cublasCsyr2_v2) SIM_NOTHING(cublasCsyr2k_v2)
SIM_NOTHING(cublasCsyr_v2) SIM_NOTHING(cublasCsyrk_v2) SIM_NOTHING(cublasCtrmm_v2)
SIM_NOTHING(cublasCtrmv_v2) SIM_NOTHING(cublasCtrsmBatched) SIM_NOTHING(cublasCtrsm_v2)
SIM_NOTHING(cublasCtrsv_v2) SIM_NOTHING(cublasDasum_v2) SIM_NOTHING(cublasDaxpy_v2)
SIM_NOTHING(cublasDcopy_v2) SIM_NOTHING(cublasDdot_v2) SIM_NOTHING(cublasDgelsBatched)
SIM_NOTHING(cublasDgemmBatched) SIM_NOTHING(cublasDgemmStridedBatched) SIM_NOTHING(cublasDgemm_v2)
SIM_NOTHING(cublasDgemv_v2) SIM_NOTHING(cublasDgeqrfBatched) SIM_NOTHING(cublasDger_v2)
SIM_NOTHING(cublasDgetrfBatched) SIM_NOTHING(cublasDgetrsBatched) SIM_NOTHING(cublasDnrm2_v2)
SIM_NOTHING(cublasDotEx) SIM_NOTHING(cublasDrot_v2) SIM_NOTHING(cublasDrotg_v2)
SIM_NOTHING(cublasDrotm_v2) SIM_NOTHING(cublasDrotmg_v2) SIM_NOTHING(cublasDscal_v2)
SIM_NOTHING(cublasDswap_v2) SIM_NOTHING(cublasDsymm_v2) SIM_NOTHING(cublasDsymv_v2)
SIM_NOTHING(cublasDsyr2_v2) SIM_NOTHING(cublasDsyr2k_v2) SIM_NOTHING(cublasDsyr_v2)
SIM_NOTHING(cublasDsyrk_v2) SIM_NOTHING(cublasDtrmm_v2) SIM_NOTHING(cublasDtrmv_v2)
SIM_NOTHING(cublasDtrsmBatched) SIM_NOTHING(cublasDtrsm_v2) SIM_NOTHING(cublasDtrsv_v2)
SIM_NOTHING(cublasDzasum_v2) SIM_NOTHING(cublasDznrm2_v2) SIM_NOTHING(cublasGemmEx)
SIM_NOTHING(cublasGemmStridedBatchedEx) SIM_NOTHING(cublasGetMatrixAsync)
SIM_NOTHING(cublasGetVectorAsync) SIM_NOTHING(cublasIcamax_v2) SIM_NOTHING(cublasIcamin_v2)
SIM_NOTHING(cublasIdamax_v2) SIM_NOTHING(cublasIdamin_v2) SIM_NOTHING(cublasIsamax_v2)
SIM_NOTHING(cublasIsamin_v2) SIM_NOTHING(cublasIzamax_v2) SIM_NOTHING(cublasIzamin_v2)
SIM_NOTHING(cublasLtMatmul) SIM_NOTHING(cublasLtMatmulAlgoConfigGetAttribute)
SIM_NOTHING(cublasLtMatmulAlgoConfigSetAttribute) SIM_NOTHING(cublasLtMatmulAlgoInit)
SIM_NOTHING(cublasLtMatmulDescSetAttribute) SIM_NOTHING(cublasLtMatmulPreferenceSetAttribute)
SIM_NOTHING(cublasLtMatrixLayoutSetAttribute) SIM_NOTHING(cublasSasum_v2)
SIM_NOTHING(cublasSaxpy_v2) SIM_NOTHING(cublasScasum_v2) SIM_NOTHING(cublasScnrm2_v2)
SIM_NOTHING(cublasScopy_v2) SIM_NOTHING(cublasSdot_v2) SIM_NOTHING(cublasSetMatrixAsync)
SIM_NOTHING(cublasSetSmCountTarget) SIM_NOTHING(cublasSetVectorAsync)
SIM_NOTHING(cublasSetWorkspace_v2) SIM_NOTHING(cublasSgelsBatched) SIM_NOTHING(cublasSgemmBatched)
SIM_NOTHING(cublasSgemmEx) SIM_NOTHING(cublasSgemmStridedBatched) SIM_NOTHING(cublasSgemm_v2)
SIM_NOTHING(cublasSgemv_v2) SIM_NOTHING(cublasSgeqrfBatched) SIM_NOTHING(cublasSger_v2)
SIM_NOTHING(cublasSgetrfBatched) SIM_NOTHING(cublasSgetrsBatched) SIM_NOTHING(cublasSnrm2_v2)
SIM_NOTHING(cublasSrot_v2) SIM_NOTHING(cublasSrotg_v2) SIM_NOTHING(cublasSrotm_v2)
SIM_NOTHING(cublasSrotmg_v2) SIM_NOTHING(cublasSscal_v2) SIM_NOTHING(cublasSswap_v2)
SIM_NOTHING(cublasSsymm_v2) SIM_NOTHING(cublasSsymv_v2) SIM_NOTHING(cublasSsyr2_v2)
SIM_NOTHING(cublasSsyr2k_v2) SIM_NOTHING(cublasSsyr_v2) SIM_NOTHING(cublasSsyrk_v2)
SIM_NOTHING(cublasStrmm_v2) SIM_NOTHING(cublasStrmv_v2) SIM_NOTHING(cublasStrsmBatched)
SIM_NOTHING(cublasStrsm_v2) SIM_NOTHING(cublasStrsv_v2) SIM_NOTHING(cublasZaxpy_v2)
SIM_NOTHING(cublasZcopy_v2) SIM_NOTHING(cublasZdotc_v2) SIM_NOTHING(cublasZdotu_v2)
SIM_NOTHING(cublasZdrot_v2) SIM_NOTHING(cublasZdscal_v2) SIM_NOTHING(cublasZgelsBatched)
SIM_NOTHING(cublasZgemmBatched) SIM_NOTHING(cublasZgemmStridedBatched) SIM_NOTHING(cublasZgemm_v2)
SIM_NOTHING(cublasZgemv_v2) SIM_NOTHING(cublasZgeqrfBatched) SIM_NOTHING(cublasZgerc_v2)
SIM_NOTHING(cublasZgeru_v2) SIM_NOTHING(cublasZgetrfBatched) SIM_NOTHING(cublasZgetrsBatched)
SIM_NOTHING(cublasZhemm_v2) SIM_NOTHING(cublasZhemv_v2) SIM_NOTHING(cublasZher2_v2)
SIM_NOTHING(cublasZher2k_v2) SIM_NOTHING(cublasZher_v2) SIM_NOTHING(cublasZherk_v2)
SIM_NOTHING(cublasZrot_v2) SIM_NOTHING(cublasZrotg_v2) SIM_NOTHING(cublasZscal_v2)
SIM_NOTHING(cublasZswap_v2) SIM_NOTHING(cublasZsymm_v2) SIM_NOTHING(cublasZsymv_v2)
SIM_NOTHING(cublasZsyr2_v2) SIM_NOTHING(cublasZsyr2k_v2) SIM_NOTHING(cublasZsyr_v2)
SIM_NOTHING(cublasZsyrk_v2) SIM_NOTHING(cublasZtrmm_v2) SIM_NOTHING(cublasZtrmv_v2)
SIM_NOTHING(cublasZtrsmBatched) SIM_NOTHING(cublasZtrsm_v2) SIM_NOTHING(cublasZtrsv_v2)
// clang-format on

}  // extern "C"
