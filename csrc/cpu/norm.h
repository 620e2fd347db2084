// CPU kernels of csrc/ops/norm.cpp over ranges of rows [begin, end). Rows: see rows.h, which covers
// [M, D] and per-head norms on [T, H, D] views of a fused projection.
#pragma once

#include "dtype.h"
#include "isa.h"
#include "rows.h"

namespace fastinfer::cpu {

struct RmsNormParams {
  RowShape shape;
  Rows x, residual, out;  // residual.data == nullptr: none
  const void* weight;
  DType dtype, weight_dtype;
  int64_t dim;
  float eps;
};

// The same, then int8 per row, symmetric or (zeros != nullptr) asymmetric: quantize_row.h. q is
// [rows, dim] contiguous; norm.out is not used.
struct RmsNormQuantParams {
  RmsNormParams norm;
  int8_t* q;
  float* scale;
  int32_t* zeros;
};

}  // namespace fastinfer::cpu

FI_DECLARE_KERNEL(rms_norm, const RmsNormParams& p, int64_t begin, int64_t end)
// scratch: dim floats of the calling thread.
FI_DECLARE_KERNEL(rms_norm_quant, const RmsNormQuantParams& p, float* scratch, int64_t begin,
                  int64_t end)
