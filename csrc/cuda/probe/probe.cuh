// One thread reports the architecture its code was compiled for: proof that a launch reached the
// device, and with which binary.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastinfer::cuda {

template <int kVariant>
__global__ void __launch_bounds__(32) probe_kernel(int32_t* out) {
#ifdef __CUDA_ARCH__
  if (threadIdx.x == 0) *out = __CUDA_ARCH__;
#endif
}

}  // namespace fastinfer::cuda
