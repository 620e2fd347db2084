// CPU kernels of csrc/ops/norm.cpp over ranges of rows. Row r of a tensor starts at (r / inner) *
// outer_stride + (r % inner) * inner_stride elements, which covers [M, D] and per-head norms on [T,
// H, D] views of a fused projection.
#pragma once

#include "dtype.h"
#include "isa.h"

namespace fastinfer::cpu {

struct Rows {
  void* data;
  int64_t outer_stride, inner_stride;
};

struct RmsNormParams {
  Rows x, residual, out;  // residual.data == nullptr: none
  const void* weight;
  DType dtype, weight_dtype;
  int64_t inner, dim;
  float eps;
};

// As above, then symmetric or (zeros != nullptr) asymmetric int8 per row: y ~ (q - zero) * scale. q
// is [rows, dim] contiguous.
struct RmsNormQuantParams {
  RmsNormParams norm;
  int8_t* q;
  float* scale;
  int32_t* zeros;
};

}  // namespace fastinfer::cpu

FI_DECLARE_KERNEL(rms_norm, const RmsNormParams& p, int64_t begin, int64_t end)
