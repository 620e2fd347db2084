// How every kernel is launched, and the two halves of programmatic dependent launch (PDL).
//
// PDL lets the next kernel of a stream start while this one still runs. The rules:
//   * every CTA of every kernel calls grid_wait() on every path, before its first access to memory
//     that an earlier kernel of the same graph launch may have written, and before its first write;
//   * a kernel may call grid_launch_dependents() before its own wait: several kernels in a row are
//     then on the GPU, each waiting for the one in front of it. After a wait everything in front is
//     complete, because none of it ends without its own wait;
//   * before the wait a kernel reads only weights, old KV, lengths, tables, plans: what was written
//     before this graph launch, or in front of a kernel that is launched without PDL, as torch's
//     are. A kernel that no rule can place (lengths made up right in front of a decode) is launched
//     without PDL;
//   * a kernel that writes such things does not call grid_launch_dependents(): the next one then
//     starts when it has ended. The exception is rotary with a cache write, as the keys it writes
//     are the newest ones, which the decode kernel behind it reads after its wait. Nor may a cache
//     be the `out` of an operator that does call it.
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
// `cluster`: CTAs along x of a cluster; more than one for code compiled for sm_90 only.
template <class... Params, class... Args>
int launch_clusters(void (*kernel)(Params...), int cluster, dim3 grid, dim3 block,
                    size_t shared_bytes, void* stream, Args&&... args) {
  if (shared_bytes > 48 * 1024) {
    const int error = allow_shared(reinterpret_cast<const void*>(kernel), shared_bytes);
    if (error != 0) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2];
  int n = 0;
  if (programmatic_launch() && device_facts().compute_capability >= 90) {
    attributes[n].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[n++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[n].id = cudaLaunchAttributeClusterDimension;
    attributes[n++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  config.attrs = attributes;
  config.numAttrs = n;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

template <class... Params, class... Args>
int launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           Args&&... args) {
  return launch_clusters(kernel, 1, grid, block, shared_bytes, stream, std::forward<Args>(args)...);
}

// Compiled for sm_90 or newer, not translated from older PTX: only then does the code of kKernel
// know clusters. On this GPU, and not switched off.
template <auto kKernel>
bool clusters_work() {
  static const bool known = [] {
    cudaFuncAttributes a;
    return cudaFuncGetAttributes(&a, kKernel) == cudaSuccess && a.ptxVersion >= 90;
  }();
  return known && device_facts().compute_capability >= 90 && !force_portable();
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastinfer::cuda
