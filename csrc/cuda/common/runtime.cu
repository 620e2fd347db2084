// CUDA runtime facts behind plain C++ functions.
#include <cuda_runtime.h>

#include "launch.h"

namespace fastinfer::cuda {

#define FI_TEXT2(x) #x
#define FI_TEXT(x) FI_TEXT2(x)

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

const char* toolkit_version() {
  return FI_TEXT(__CUDACC_VER_MAJOR__) "." FI_TEXT(__CUDACC_VER_MINOR__);
}

int runtime_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace fastinfer::cuda
