// TMA descriptors of the linears, encoded by the driver, whose entry point is looked up through the
// runtime: the library does not link against libcuda.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "../../cpu/dtype.h"

namespace fastinfer::cuda {

// Activations [rows][columns] of 16-bit elements (row stride in elements), for boxes of `box_rows`
// rows x 64 columns, 128-byte swizzled. What lies outside arrives as zeros.
int activation_map(CUtensorMap& map, const void* data, DType dtype, int64_t rows, int64_t columns,
                   int64_t row_stride, int64_t box_rows);

// Packed weights [blocks][pieces] of 2 KiB each, for boxes of `box_pieces` of `box_blocks` blocks.
int packed_map(CUtensorMap& map, const void* data, int64_t pieces, int64_t blocks,
               int64_t box_pieces, int64_t box_blocks);

// Codes [rows][columns], int8 (row stride in bytes, a multiple of 16), for boxes of `box_rows` rows
// x 128 columns, 128-byte swizzled. What lies outside arrives as zeros.
int code_map(CUtensorMap& map, const void* data, int64_t rows, int64_t columns, int64_t row_stride,
             int64_t box_rows);

}  // namespace fastinfer::cuda
