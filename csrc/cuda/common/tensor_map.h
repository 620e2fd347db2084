// Encodes a TMA tensor map. The driver's function is looked up at the first call, never linked.
#pragma once

#include <cuda.h>

namespace fastinfer::cuda {

// Four dimensions: sizes and box in elements, strides in bytes; steps of one element, zeros
// outside. Returns a cudaError_t.
int encode_tensor_map(CUtensorMap& map, CUtensorMapDataType type, const void* data,
                      const cuuint64_t (&sizes)[4], const cuuint64_t (&strides)[3],
                      const cuuint32_t (&box)[4], CUtensorMapSwizzle swizzle);

}  // namespace fastinfer::cuda
