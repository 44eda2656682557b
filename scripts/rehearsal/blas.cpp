// The functions of cuBLAS whose arguments nobody looks at; apart from its headers, which declare other types.
#include <atomic>
#define API extern "C" __attribute__((visibility("default")))
#define PRODUCT(name) API int name(...) { rehearsal_products++; rehearsal_launches++; return 0; }
#define OK(name) API int name(...) { return 0; }

extern "C" std::atomic<long> rehearsal_launches, rehearsal_products;

PRODUCT(cublasGemmEx) PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemm_v2) PRODUCT(cublasSgemmEx) PRODUCT(cublasSgemmStridedBatched) PRODUCT(cublasSgemmBatched)
PRODUCT(cublasDgemm_v2) PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasSgemv_v2) PRODUCT(cublasDgemv_v2) PRODUCT(cublasDotEx) PRODUCT(cublasSdot_v2)
PRODUCT(cublasStrsm_v2) PRODUCT(cublasStrsmBatched)
OK(cublasDestroy_v2) OK(cublasSetStream_v2) OK(cublasSetWorkspace_v2)
OK(cublasSetMathMode) OK(cublasSetPointerMode_v2) OK(cublasSetSmCountTarget)
OK(cublasLtMatmulDescDestroy) OK(cublasLtMatmulDescSetAttribute)
OK(cublasLtMatmulPreferenceDestroy) OK(cublasLtMatmulPreferenceSetAttribute)
OK(cublasLtMatrixLayoutDestroy) OK(cublasLtMatrixLayoutSetAttribute)
