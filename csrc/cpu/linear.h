// CPU kernels of csrc/ops/linear*.cpp. Each computes a range of output-channel blocks for all
// tokens given; an output's sum runs in one order fixed by K (and the group size) alone, so its
// bits depend on neither M, the other rows, nor the number of threads.
//
// Y[M,N] = X[M,K] W[N,K]^T + bias[N]. Strides are in elements; the last dimension is contiguous.
#pragma once

#include "dtype.h"
#include "isa.h"

namespace fastinfer::cpu {

struct LinearOut {
  void* data;
  int64_t stride;
  DType dtype;
  const void* bias;  // [N] of dtype, or nullptr
};

// x and weight of one floating dtype. A block is kDenseBlock output channels.
constexpr int64_t kDenseBlock = 16;
struct DenseParams {
  const void *x, *weight;
  int64_t x_stride, weight_stride;
  DType dtype;
  int64_t m, n, k;
  LinearOut out;
};

// Activations staged for the packed kernels: fp32, tiles of kTokenTile tokens, each tile [k_pad][T]
// with T = tile_tokens(tokens left), columns gathered by perm, columns past K zero. group_sums
// (float zeros only): [tokens][groups], the sum of x over each group.
constexpr int64_t kTokenTile = 8;
constexpr int64_t tile_tokens(int64_t left) { return left > 4 ? 8 : left > 2 ? 4 : left; }
struct StageParams {
  const void* x;
  int64_t x_stride;
  DType dtype;
  int64_t m, k, k_pad;
  const int32_t* perm;
  float* staged;
  float* group_sums;
  int64_t group_size, groups;
};

// Packed weights, csrc/ops/linear_layout.h: words [n_pad/16][words][16], scales and zeros
// [groups][n_pad]. A block is kPackedBlock output channels.
constexpr int64_t kPackedBlock = 64;
constexpr int64_t kAhead = 16;  // rows of words fetched ahead where memory sets the pace
struct PackedParams {
  const float *staged, *group_sums;
  const uint32_t* qweight;
  const float* scales;
  const uint8_t* zeros;      // integer zeros or nullptr
  const float* float_zeros;  // or nullptr
  int bits;
  int64_t m, n, n_pad, words, k_pad, group_size, groups;
  LinearOut out;
};

// The same with int8 activations (linear_packed_int8.cpp). A token's columns are quantised in runs:
// one per group, groups longer than kRunInt8 columns (which bounds an int32 sum) in several.
// x_scale and x_sum: [tokens][runs]. gathered (only with perm) [tokens][k] and codes
// [tokens][k_pad] are scratch; staged holds the tiles of StageParams in int8.
constexpr int64_t kRunInt8 = 32768;
struct StageInt8Params {
  const void* x;
  int64_t x_stride;
  DType dtype;
  int64_t m, k, k_pad;
  const int32_t* perm;
  int bits;
  int64_t group_size, groups, runs;
  float* gathered;
  int8_t *codes, *staged;
  float* x_scale;
  int32_t* x_sum;
};
struct PackedInt8Params {
  PackedParams packed;  // staged and group_sums unused
  const int8_t* staged;
  const float* x_scale;
  const int32_t* x_sum;
  int64_t runs;
};

// int8 x int8 -> int32. y = float(sum_k (x - x_zero) w) * x_scale[m] * weight_scale[n] + bias. A
// block is kDenseBlock output channels.
struct Int8Params {
  const int8_t *x, *weight;
  int64_t x_stride, weight_stride;
  const float *x_scale, *weight_scale;
  const int32_t *x_zeros, *weight_sum;  // or nullptr; without weight_sum the kernel adds it up
  int64_t m, n, k;
  LinearOut out;
};

}  // namespace fastinfer::cpu

FI_DECLARE_KERNEL(linear_dense, const DenseParams& p, int64_t begin, int64_t end)
FI_DECLARE_KERNEL(linear_stage, const StageParams& p, int64_t begin, int64_t end)
FI_DECLARE_KERNEL(linear_packed, const PackedParams& p, int64_t begin, int64_t end)
FI_DECLARE_KERNEL(linear_stage_int8, const StageInt8Params& p, int64_t begin, int64_t end)
FI_DECLARE_KERNEL_VNNI(linear_packed_int8, const PackedInt8Params& q, int64_t begin, int64_t end)
FI_DECLARE_KERNEL_VNNI(linear_int8, const Int8Params& p, int64_t begin, int64_t end)
