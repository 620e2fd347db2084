// launch() (launch.cuh) for kernels whose blocks form clusters (sm_90).
#pragma once

#include "launch.cuh"

namespace fastinfer::cuda {

// In clusters of `cluster` neighbouring blocks; 1: an ordinary launch.
template <class... Params, class... Args>
int launch_clusters(int cluster, void (*kernel)(Params...), dim3 grid, dim3 block,
                    size_t shared_bytes, void* stream, Args&&... args) {
  if (cluster == 1)
    return launch(kernel, grid, block, shared_bytes, stream, std::forward<Args>(args)...);
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = programmatic_launch() ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

}  // namespace fastinfer::cuda
