#include "tensor_map.h"

#include <cuda_runtime.h>

namespace fastinfer::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault,
                                       &found) != cudaSuccess ||
      found != cudaDriverEntryPointSuccess)
    return nullptr;
  return reinterpret_cast<Encode>(entry);
}

}  // namespace

int encode_tensor_map(CUtensorMap& map, CUtensorMapDataType type, const void* data,
                      const cuuint64_t (&sizes)[4], const cuuint64_t (&strides)[3],
                      const cuuint32_t (&box)[4], CUtensorMapSwizzle swizzle) {
  static const Encode entry = find_encode();
  if (!entry) return cudaErrorNotSupported;
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult result =
      entry(&map, type, 4, const_cast<void*>(data), sizes, strides, box, steps,
            CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace fastinfer::cuda
