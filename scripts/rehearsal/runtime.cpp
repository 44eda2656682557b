// A CUDA runtime and cuBLAS that have one H100 and run nothing on it, preloaded below PyTorch's CUDA build.
// Device memory is address space whose pages nobody touches. Copies between host and device are real, and so are small
// ones on the device. Kernels are counted. Every wait of the host, and every copy that may be one, calls `listener`.
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#define API extern "C" __attribute__((visibility("default")))
#define OK(name, ...) API cudaError_t name(__VA_ARGS__) { return cudaSuccess; }

// -- what Python reads and sets --------------------------------------------------------------------------------------
extern "C" {
std::atomic<long> rehearsal_launches{0}, rehearsal_products{0}; // everything enqueued; of it, cuBLAS calls
int rehearsal_bool = 1;                                         // what a single byte reads as, such as tensor.all()
void (*rehearsal_listener)(const char *what, size_t bytes) = nullptr;
}
static void tell(const char *what, size_t bytes = 0) { if (rehearsal_listener) rehearsal_listener(what, bytes); }
static cudaError_t launch() { rehearsal_launches++; return cudaSuccess; }
static cublasStatus_t multiply() { rehearsal_products++; rehearsal_launches++; return CUBLAS_STATUS_SUCCESS; }

// -- memory ----------------------------------------------------------------------------------------------------------
static const size_t SMALL = 1 << 16; // bytes of a copy on the device that is done; larger ones would touch its pages
static std::mutex mutex;
static std::map<char *, size_t> on_device, pinned;

static bool in(std::map<char *, size_t> &blocks, const void *pointer) {
  std::lock_guard<std::mutex> guard(mutex);
  auto block = blocks.upper_bound((char *)pointer);
  if (block == blocks.begin()) return false;
  --block;
  return (char *)pointer < block->first + block->second;
}
static void put(std::map<char *, size_t> &blocks, void *pointer, size_t bytes) {
  std::lock_guard<std::mutex> guard(mutex);
  blocks[(char *)pointer] = bytes;
}
static size_t take(std::map<char *, size_t> &blocks, void *pointer) { // the size of a block, which is forgotten
  std::lock_guard<std::mutex> guard(mutex);
  auto block = blocks.find((char *)pointer);
  if (block == blocks.end()) return 0;
  size_t bytes = block->second;
  blocks.erase(block);
  return bytes;
}
API cudaError_t cudaMalloc(void **pointer, size_t bytes) {
  *pointer = mmap(nullptr, bytes += !bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*pointer == MAP_FAILED) return cudaErrorMemoryAllocation;
  put(on_device, *pointer, bytes);
  return cudaSuccess;
}
API cudaError_t cudaFree(void *pointer) {
  if (size_t bytes = take(on_device, pointer)) munmap(pointer, bytes);
  return cudaSuccess;
}
API cudaError_t cudaMallocAsync(void **pointer, size_t bytes, cudaStream_t) { return cudaMalloc(pointer, bytes); }
API cudaError_t cudaFreeAsync(void *pointer, cudaStream_t) { return cudaFree(pointer); }
API cudaError_t cudaGetSymbolAddress(void **pointer, const void *) { return cudaMalloc(pointer, SMALL); }
API cudaError_t cudaHostRegister(void *pointer, size_t bytes, unsigned) { put(pinned, pointer, bytes); return cudaSuccess; }
API cudaError_t cudaHostUnregister(void *pointer) { take(pinned, pointer); return cudaSuccess; }
API cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned) {
  *pointer = malloc(bytes + !bytes);
  return cudaHostRegister(*pointer, bytes, 0);
}
API cudaError_t cudaFreeHost(void *pointer) { take(pinned, pointer); free(pointer); return cudaSuccess; }
API cudaError_t cudaMemGetInfo(size_t *free, size_t *total) { *free = 79ull << 30; *total = 80ull << 30; return cudaSuccess; }
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *a, const void *pointer) {
  *a = {};
  a->type = in(on_device, pointer) ? cudaMemoryTypeDevice : in(pinned, pointer) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  a->devicePointer = a->hostPointer = (void *)pointer;
  return cudaSuccess;
}

// -- copies ----------------------------------------------------------------------------------------------------------
static cudaError_t copy(const char *how, void *to, const void *from, size_t bytes) {
  bool to_device = in(on_device, to), from_device = in(on_device, from);
  if (to_device && from_device) {
    if (bytes <= SMALL) memmove(to, from, bytes);
    return launch();
  }
  if (from_device && bytes == 1) *(char *)to = (char)rehearsal_bool;
  else memmove(to, from, bytes);
  char what[64];
  snprintf(what, sizeof what, "%s %s %s", how, from_device ? "D2H" : to_device ? "H2D" : "H2H",
           in(pinned, from_device ? to : from) ? "pinned" : "pageable");
  tell(what, bytes);
  return cudaSuccess;
}
API cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind) { return copy("sync", to, from, bytes); }
API cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return copy("async", to, from, bytes);
}
API cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                                  cudaMemcpyKind, cudaStream_t) {
  for (size_t row = 0; row < height; row++) copy("async", (char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
  return cudaSuccess;
}
static cudaError_t fill(void *pointer, int value, size_t bytes) {
  if (bytes <= SMALL) memset(pointer, value, bytes);
  return launch();
}
API cudaError_t cudaMemset(void *pointer, int value, size_t bytes) { return fill(pointer, value, bytes); }
API cudaError_t cudaMemsetAsync(void *pointer, int value, size_t bytes, cudaStream_t) { return fill(pointer, value, bytes); }
OK(cudaMemcpyPeerAsync, void *, int, const void *, int, size_t, cudaStream_t)
OK(cudaMemcpyToSymbol, const void *, const void *, size_t, size_t, cudaMemcpyKind)

// -- waits -----------------------------------------------------------------------------------------------------------
API cudaError_t cudaStreamSynchronize(cudaStream_t) { tell("stream sync"); return cudaSuccess; }
API cudaError_t cudaDeviceSynchronize() { tell("device sync"); return cudaSuccess; }
API cudaError_t cudaEventSynchronize(cudaEvent_t) { tell("event sync"); return cudaSuccess; }

// -- kernels ---------------------------------------------------------------------------------------------------------
API cudaError_t cudaLaunchKernel(const void *, dim3, dim3, void **, size_t, cudaStream_t) { return launch(); }
API cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void **, size_t, cudaStream_t) { return launch(); }
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *, const void *, void **) { return launch(); }
API cudaError_t cudaLaunchCooperativeKernel(const void *, dim3, dim3, void **, size_t, cudaStream_t) { return launch(); }
API cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) { *kernel = (cudaKernel_t)function; return cudaSuccess; }
API char __cudaInitModule(void **) { return 1; }
OK(cudaFuncSetAttribute, const void *, cudaFuncAttribute, int)
OK(cudaKernelSetAttributeForDevice, cudaKernel_t, cudaFuncAttribute, int, int)
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *a, const void *) {
  *a = {};
  a->numRegs = 32;
  a->maxThreadsPerBlock = 1024;
  a->binaryVersion = a->ptxVersion = 90;
  a->maxDynamicSharedSizeBytes = 232448;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *, int, size_t, unsigned) {
  *count = 2;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *count, const void *, int, size_t) { *count = 2; return cudaSuccess; }

// -- streams and events ----------------------------------------------------------------------------------------------
static cudaError_t make(void *handle) { *(void **)handle = malloc(64); return cudaSuccess; }
API cudaError_t cudaStreamCreate(cudaStream_t *s) { return make(s); }
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned) { return make(s); }
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned, int) { return make(s); }
API cudaError_t cudaEventCreate(cudaEvent_t *e) { return make(e); }
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) { return make(e); }
API cudaError_t cudaEventDestroy(cudaEvent_t e) { free(e); return cudaSuccess; }
API cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t, cudaEvent_t) { *ms = 1; return cudaSuccess; }
OK(cudaStreamDestroy, cudaStream_t)
OK(cudaStreamQuery, cudaStream_t)
OK(cudaStreamWaitEvent, cudaStream_t, cudaEvent_t, unsigned)
OK(cudaEventRecord, cudaEvent_t, cudaStream_t)
OK(cudaEventRecordWithFlags, cudaEvent_t, cudaStream_t, unsigned)
OK(cudaEventQuery, cudaEvent_t)
API cudaError_t cudaStreamGetPriority(cudaStream_t, int *priority) { *priority = 0; return cudaSuccess; }
API cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return cudaSuccess; }
API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *s) { *s = cudaStreamCaptureStatusNone; return cudaSuccess; }
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *,
                                         const cudaGraphNode_t **, const cudaGraphEdgeData **, size_t *) {
  *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  return cudaSuccess;
}
OK(cudaThreadExchangeStreamCaptureMode, cudaStreamCaptureMode *)
API cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void *data, unsigned) {
  f(s, cudaSuccess, data);
  return cudaSuccess;
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t f, void *data) { f(data); return cudaSuccess; }

// -- the device ------------------------------------------------------------------------------------------------------
API cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
API cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
OK(cudaSetDevice, int)
API cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return cudaSuccess; }
OK(cudaGetLastError)
OK(cudaPeekAtLastError)
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
  *p = {};
  strcpy(p->name, "NVIDIA H100 80GB HBM3");
  p->totalGlobalMem = 80ull << 30;
  p->major = 9;
  p->multiProcessorCount = 132;
  p->warpSize = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448;
  p->sharedMemPerMultiprocessor = 233472;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->l2CacheSize = 50 << 20;
  p->memoryBusWidth = 5120;
  p->textureAlignment = 512;
  p->managedMemory = p->concurrentManagedAccess = p->unifiedAddressing = p->concurrentKernels = 1;
  p->asyncEngineCount = 3;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 233472; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = 32; break;
    default: *value = 1;
  }
  return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int *can, int, int) { *can = 0; return cudaSuccess; }
API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int) { return make(pool); }
API cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int) { snprintf(id, length, "0000:01:00.0"); return cudaSuccess; }
static int driver_function(...) { return 0; } // any function of the driver that the runtime is asked for
API cudaError_t cudaGetDriverEntryPointByVersion(const char *, void **function, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult *result) {
  *function = (void *)driver_function;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
OK(cudaProfilerStart)
OK(cudaProfilerStop)

// -- cuBLAS ----------------------------------------------------------------------------------------------------------
static cublasStatus_t make_blas(void *handle) { *(void **)handle = malloc(256); return CUBLAS_STATUS_SUCCESS; }
API cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) { return make_blas(handle); }
API cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t *mode) { *mode = CUBLAS_DEFAULT_MATH; return CUBLAS_STATUS_SUCCESS; }
API cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t, cublasPointerMode_t *mode) {
  *mode = CUBLAS_POINTER_MODE_HOST;
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, cublasComputeType_t, cudaDataType_t) { return make_blas(d); }
API cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *l, cudaDataType, uint64_t, uint64_t, int64_t) { return make_blas(l); }
API cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p) { return make_blas(p); }
API cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                                  cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int,
                                                  cublasLtMatmulHeuristicResult_t *result, int *found) {
  *result = {};
  *found = 1;
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t, const void *, const void *, cublasLtMatrixLayout_t, const void *,
                                  cublasLtMatrixLayout_t, const void *, const void *, cublasLtMatrixLayout_t, void *,
                                  cublasLtMatrixLayout_t, const cublasLtMatmulAlgo_t *, void *, size_t, cudaStream_t) {
  return multiply();
}
