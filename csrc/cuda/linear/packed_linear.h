// Launchers of int4_linear and int8_linear: Y[M,N] = X[M,K] W[N,K]^T + bias[N], W packed as FI4 /
// FI8 (csrc/ops/linear_layout.h). Strides in elements; the last dimension is contiguous. Each
// returns a cudaError_t.
#pragma once

#include "../../cpu/dtype.h"

namespace fastinfer::cuda {

struct PackedLinear {
  const void* x;
  int64_t x_stride;
  DType dtype;  // of x, out and bias: f16 or bf16
  int64_t m, n, k;
  const uint32_t* qweight;
  int bits;  // 4 or 8
  const void* scales;
  DType scale_dtype;  // f32, f16 or bf16
  const void* zeros;  // nullptr: the middle code (8 or 128)
  DType zero_dtype;   // u8: w = (q - z) s; floating: w = (q - middle) s + z
  int64_t group_columns, groups;
  const int32_t* perm;  // column c of W meets column perm[c] of X; nullptr: c
  void* out;
  int64_t out_stride;
  const void* bias;  // [N] or nullptr
  bool batch_invariant;
  void* workspace;  // zeroed counters and partial sums, left with its counters zero
};

}  // namespace fastinfer::cuda
