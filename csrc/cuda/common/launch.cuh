// How every kernel is launched, and the two halves of programmatic dependent launch (PDL).
//
// PDL lets the next kernel of a stream start while this one still runs. The rules:
//   * every CTA of every kernel calls grid_wait() on every path, before its first access to memory
//     that an earlier kernel of the same graph launch may have written, and before its first write;
//   * before the wait a kernel reads only what no kernel right in front of it writes: weights, old
//     KV, lengths, tables, plans. They are written before this graph launch, or by a kernel with at
//     least one other in between: that one's wait is over when this one starts. A kernel that no
//     rule can place (lengths made up right in front of a decode) is launched without PDL;
//   * a kernel that writes such things never calls grid_launch_dependents(): the next one then
//     starts when it has ended. Nor may a cache be the `out` of an operator that does call it.
// Without the launch attribute both instructions do nothing.
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "launch.h"

namespace fastinfer::cuda {

__device__ __forceinline__ void grid_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void grid_launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// kernel<<<grid, block, shared_bytes, stream>>>(args...), with the PDL attribute where it is on.
// Raises the kernel's dynamic shared memory limit where more than 48 KiB are asked for.
template <class... Params, class... Args>
int launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           Args&&... args) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute[1];
  attribute[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute[0].val.programmaticStreamSerializationAllowed = 1;
  config.attrs = attribute;
  config.numAttrs = programmatic_launch() && device_facts().compute_capability >= 90 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastinfer::cuda
