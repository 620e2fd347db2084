// CPU kernels of csrc/ops/linear_quantize.cpp: activations per token (see quantize_row.h) and
// weights per group of input columns. Strides in elements, last dimension contiguous.
#pragma once

#include "dtype.h"
#include "isa.h"

namespace fastinfer::cpu {

struct QuantizeRowsParams {
  const void* x;
  int64_t x_stride;
  DType dtype;
  int64_t k;
  const float* static_scale;  // one value or nullptr
  int8_t* q;
  int64_t q_stride;
  float* scale;
  int32_t* zeros;  // nullptr: symmetric
};

struct QuantizeWeightParams {
  const void* weight;
  int64_t weight_stride;
  DType dtype;
  int64_t k, group_size, groups;
  int bits;
  uint8_t* codes;  // [N,K]
  void* scales;    // [N,G] of scale_dtype
  DType scale_dtype;
  uint8_t* zeros;  // [N,G]; nullptr: symmetric
};

}  // namespace fastinfer::cpu

FI_DECLARE_KERNEL(quantize_rows, const QuantizeRowsParams& p, int64_t begin, int64_t end)
FI_DECLARE_KERNEL(quantize_weight_rows, const QuantizeWeightParams& p, int64_t begin, int64_t end)
