// Launcher of pack_weight: canonical codes [n, k] (codes_stride in bytes), scales and zeros
// [n, groups] to a layout of csrc/ops/linear_layout.h. Codes outside the layout's bits are masked.
// Never starts the next kernel early. Returns a cudaError_t.
#pragma once

#include "../../cpu/dtype.h"
#include "../../ops/linear_layout.h"

namespace fastinfer::cuda {

struct PackWeight {
  PackedLayout layout;
  const uint8_t* codes;
  int64_t codes_stride;
  const void *scales, *zeros;  // zeros: u8, floating or nullptr
  DType scale_dtype, zero_dtype;
  int64_t group_columns, groups;
  uint32_t* qweight;
  void *packed_scales, *packed_zeros;
  DType packed_scale_dtype, packed_zero_dtype;
};

int pack_weight(const PackWeight& p, void* stream);

}  // namespace fastinfer::cuda
