// RMS norm of rows, with residual addition and with int8 output:
//
//   y = x / sqrt(mean(x^2) + eps) * weight      fp32 arithmetic, one rounding
//   residual: residual = round(residual + x), and that sum is normalised
//   kQuant: int8 codes (common/quantize_row.cuh) of x * weight, whose scale is then multiplied by
//   1 / sqrt(..): the factor is the row's own, so sum and range are one reduction
//
// Rows x [rows, D], residual, out with strides (cpu/rows.h); weight [D] of any float type.
//
// A row belongs to a group of threads (common/row_group.h), chosen by D alone, and every thread
// sums its packs of 16 bytes in the same order on all paths: a row's bits depend on nothing but the
// row.
//   in registers   rows of at most 1024 * 2 packs (16384 elements of a 16-bit type), aligned, with
//                  at most two row dimensions, weight of x's type: read once, kept between the sum
//                  and the output
//   any row        norm_any.cu: walked pack by pack, read again for the output
// With many rows the int8 form lets a thread do the work of two of the group (t and t + threads /
// 2), with a sum of its own for each: the same tree, half the reductions and scales per element.
#pragma once

#include "../../cpu/norm.h"
#include "../common/quantize_row.cuh"

namespace fastinfer::cuda {

constexpr int kNormPacks = 2;  // of a thread of the group

// Parameters of rows in registers. Few: every 100 bytes cost a launch some 0.1 us.
struct NormLaunch {
  const void *x, *weight;
  void *residual, *out;  // out: q where there are codes
  float* scale;
  int32_t* zeros;
  int64_t x_stride[2], residual_stride[2], out_stride[2];  // elements, outer and inner dimension
  int64_t rows;
  uint32_t inner;  // rows of the inner dimension; 0: one dimension, of stride [1]
  int32_t dim;
  float eps, inverse_dim;
  uint16_t row_threads, threads;  // of the group; in fact
};
static_assert(sizeof(NormLaunch) <= 128, "small parameters: see docs/kernels/norm.md");

// Of any row.
struct NormAnyLaunch {
  cpu::RmsNormQuantParams p;
  int64_t rows;
  int row_threads, rows_per_block;
  float inverse_dim;
  bool packs, weight_packs, code_packs;
};

// Sum of squares and range of the row so far, one per warp.
struct NormScratch {
  RowScratch<float> sums;
  float4 both[32];  // sums of this thread and of the second one, range
};

template <int kSize>
__device__ __forceinline__ float add_squares(float sum, const float (&v)[kSize]) {
#pragma unroll
  for (int j = 0; j < kSize; ++j) sum = __fmaf_rn(v[j], v[j], sum);
  return sum;
}

__device__ __forceinline__ float sum_row(RowGroup& group, float sum, NormScratch& scratch) {
  return group.reduce(sum, scratch.sums, [](float x, float y) { return x + y; });
}

// Sum and range of the row, with one barrier. The sum is that of sum_row(), bit by bit; `paired`:
// over a group of twice as many threads, where `high` stands for thread t + threads (one row per
// block).
struct SumAndRange {
  float sum;
  RowRange range;
};
__device__ __forceinline__ SumAndRange reduce_both(const RowGroup& group, float low, float high,
                                                   const RowRange& range, bool paired,
                                                   bool symmetric, NormScratch& scratch) {
  uint2 bits = max_over_lanes(range_bits(range), min(group.threads, 32), symmetric);
#pragma unroll
  for (int lane = 16; lane > 0; lane >>= 1) {
    if (lane < group.threads) low += __shfl_xor_sync(kAllLanes, low, lane);
    if (paired) high += __shfl_xor_sync(kAllLanes, high, lane);
  }
  if (group.warps <= 1) return {low, range_of_bits(bits)};
  const int lane = threadIdx.x % 32;
  if (lane == 0)
    scratch.both[threadIdx.x / 32] =
        make_float4(low, high, __uint_as_float(bits.x), __uint_as_float(bits.y));
  __syncthreads();
  const float4* values = scratch.both + group.row * group.warps;
  const float4 ends = values[min(lane, group.warps - 1)];
  const int warps = paired ? 2 * group.warps : group.warps;
  const int span = 1 << (32 - __clz(warps - 1)), mine = lane & (span - 1);
  float sum = 0.0f;
  if (mine < group.warps) {
    sum = values[mine].x;
  } else if (mine < warps) {
    sum = values[mine - group.warps].y;
  }
#pragma unroll
  for (int other = 16; other > 0; other >>= 1)
    if (other < span) sum += __shfl_xor_sync(kAllLanes, sum, other);
  bits = max_over_lanes(make_uint2(__float_as_uint(ends.z), __float_as_uint(ends.w)), 32,
                        symmetric);
  return {sum, range_of_bits(bits)};
}

template <class E>
__device__ __forceinline__ uint4 sum_of(const uint4& a, const uint4& b) {
  float u[Pack<E>::kSize], v[Pack<E>::kSize];
  unpack<E>(u, a);
  unpack<E>(v, b);
#pragma unroll
  for (int j = 0; j < Pack<E>::kSize; ++j) u[j] += v[j];
  return pack_of<E>(u);
}

// Codes of the row of x * weight. `inv` is only a factor of the scale; where it is 0 (a sum beyond
// fp32) the row is one of zeros. One thread of the row writes what belongs to the row.
__device__ __forceinline__ RowCodes norm_codes(const RowRange& range, float inv, float* scale,
                                               int32_t* zeros, int64_t r, bool owner) {
  RowRange all = range;
  if (inv == 0.0f && range.top < INFINITY && range.bottom > -INFINITY) all = RowRange{};
  const RowCodes codes = row_codes(all, zeros != nullptr);
  if (owner) {
    const bool no_codes = codes.low == codes.high;  // scale 1 or NaN
    scale[r] = no_codes ? codes.scale : codes.scale * inv;
    if (zeros) zeros[r] = codes.zero;
  }
  return codes;
}

// norm.cu and norm_quant.cu: rows in registers where that is possible, else the path for any row
// (norm_any.cu).
int launch_norm_any(const NormAnyLaunch& a, unsigned blocks, int block, void* stream);

template <bool kQuant>
int launch_norm(const cpu::RmsNormQuantParams& p, int64_t rows, void* stream);

}  // namespace fastinfer::cuda
