// TMA descriptors, encoded by the driver, whose entry point is looked up through the runtime: the
// library does not link against libcuda.
#pragma once

#include <cuda.h>

#include "flash_attention.h"

namespace fastinfer::cuda::flash {

// The tensor [batch or pages][heads][tokens or rows of a page][head_dim] of 16-bit elements at
// `data` (strides in elements), for boxes of `box_rows` rows x 64 columns, 128-byte swizzled.
int tensor_map(CUtensorMap& map, const void* data, DType dtype, int64_t head_dim, int64_t rows,
               int64_t heads, int64_t batch, int64_t row_stride, int64_t head_stride,
               int64_t batch_stride, int64_t box_rows);

}  // namespace fastinfer::cuda::flash
