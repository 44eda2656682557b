// libcuda.so.1 of the GPU that is not there: what PyTorch's NVRTC library and Triton's launcher ask of a driver.
#include <cstddef>
#include <dlfcn.h>
#define API extern "C" __attribute__((visibility("default")))
#define OK(name) API int name(...) { return 0; }

static char object[64]; // stands for every context, module and function

API int cuInit(unsigned) { return 0; }
API int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
API int cuDeviceGetCount(int *count) { *count = 1; return 0; }
API int cuDeviceGet(int *device, int) { *device = 0; return 0; }
API int cuDeviceGetAttribute(int *value, int attribute, int) { // of CUdevice_attribute
  switch (attribute) {
    case 1: *value = 1024; break;              // MAX_THREADS_PER_BLOCK
    case 8: *value = 49152; break;             // MAX_SHARED_MEMORY_PER_BLOCK
    case 10: *value = 32; break;               // WARP_SIZE
    case 12: case 82: *value = 65536; break;   // MAX_REGISTERS_PER_BLOCK, PER_MULTIPROCESSOR
    case 13: *value = 1980000; break;          // CLOCK_RATE, kHz
    case 16: *value = 132; break;              // MULTIPROCESSOR_COUNT
    case 36: *value = 2619000; break;          // MEMORY_CLOCK_RATE, kHz
    case 37: *value = 5120; break;             // GLOBAL_MEMORY_BUS_WIDTH
    case 39: *value = 2048; break;             // MAX_THREADS_PER_MULTIPROCESSOR
    case 75: *value = 9; break;                // COMPUTE_CAPABILITY_MAJOR
    case 76: *value = 0; break;                // COMPUTE_CAPABILITY_MINOR
    case 81: *value = 233472; break;           // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
    case 97: *value = 232448; break;           // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    default: *value = 1;
  }
  return 0;
}
API int cuCtxGetCurrent(void **context) { *context = object; return 0; }
API int cuCtxGetDevice(int *device) { *device = 0; return 0; }
API int cuDevicePrimaryCtxRetain(void **context, int) { *context = object; return 0; }
API int cuDevicePrimaryCtxGetState(int, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
API int cuModuleLoad(void **module, const char *) { *module = object; return 0; }
API int cuModuleLoadData(void **module, const void *) { *module = object; return 0; }
API int cuModuleLoadDataEx(void **module, const void *, unsigned, void *, void **) { *module = object; return 0; }
API int cuModuleGetFunction(void **function, void *, const char *) { *function = object; return 0; }
API int cuFuncGetAttribute(int *value, int attribute, void *) { // threads per block; bytes of shared and local memory; registers
  *value = attribute == 0 ? 1024 : attribute == 1 || attribute == 3 ? 0 : 32;
  return 0;
}
API int cuGetErrorString(int, const char **text) { *text = "an error of the rehearsal"; return 0; }
API int cuOccupancyMaxActiveClusters(int *count, void *, void *) { *count = 16; return 0; }
API int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, void *, int, size_t) { *count = 2; return 0; }
API int cuPointerGetAttribute(void *value, int attribute, unsigned long long pointer) {
  if (attribute == 2) *(int *)value = 2; // MEMORY_TYPE: device
  else *(unsigned long long *)value = pointer;
  return 0;
}
API int cuGetProcAddress_v2(const char *name, void **function, int, unsigned long long, int *found) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (found) *found = 0;
  return *function ? 0 : 500; // CUDA_ERROR_NOT_FOUND
}
OK(cuLaunchKernel) OK(cuLaunchKernelEx) OK(cuLaunchCooperativeKernel) // counted by the Python that asks for them
OK(cuPointerGetAttributes) OK(cuFuncSetAttribute) OK(cuFuncSetCacheConfig) OK(cuModuleUnload)
OK(cuLinkCreate_v2) OK(cuLinkAddData_v2) OK(cuLinkComplete) OK(cuTensorMapEncodeTiled) OK(cuTensorMapEncodeIm2col)
OK(cuCtxSetCurrent) OK(cuCtxPushCurrent_v2) OK(cuCtxSetLimit) OK(cuCtxGetLimit) OK(cuCtxSynchronize) OK(cuStreamSynchronize)
OK(cuMemAlloc_v2) OK(cuMemFree_v2) OK(cuMemcpyHtoD_v2) OK(cuMemcpyDtoH_v2)
