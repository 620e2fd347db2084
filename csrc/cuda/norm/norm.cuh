// RMS norm of rows, with residual addition and with int8 output:
//
//   y = x / sqrt(mean(x^2) + eps) * weight      fp32 arithmetic, one rounding
//   residual: residual = round(residual + x), and that sum is normalised
//   codes: int8 codes (common/quantize_row.cuh) of x * weight, whose scale is then multiplied by
//   1 / sqrt(..): the factor is the row's own, so sum and range are one reduction. Not by IEEE
//   quotients but by one multiplication with the rounded reciprocal: what is left of a row's time
//   are instructions, and these values are not the CPU's to the last bit anyway
//
// Rows x [rows, D], residual, out with strides (cpu/rows.h); weight [D] of any float type.
//
// The sum of squares is a fixed tree over the packs of 16 bytes of a row: pack p belongs to lane
// p % 32 of warp p / 32, each warp is summed as a butterfly, then the warps are. How many packs a
// thread really holds (kPacks) only says who adds, so that a row's bits depend on nothing but the
// row, while few rows are spread over as many threads as there is work for.
//   in registers   rows of at most 2048 packs (16384 elements of a 16-bit type), aligned, with at
//                  most two row dimensions, weight of x's type: read once (norm_rows.cuh)
//   any row        norm_any.cu: walked pack by pack, read again for the output
#pragma once

#include "../../cpu/norm.h"
#include "../common/quantize_row.cuh"

namespace fastinfer::cuda {

constexpr int kMaxPacks = 2 * kMaxRowThreads, kMaxWarps = kMaxPacks / 32;

// Parameters of rows in registers.
struct NormLaunch {
  const void *x, *weight;
  void *residual, *out;  // out: q where there are codes
  float* scale;
  int32_t* zeros;
  int64_t x_stride[2], residual_stride[2], out_stride[2];  // elements, outer and inner dimension
  uint32_t rows, inner;  // rows of the inner dimension; 0: one dimension, of stride [1]
  int32_t packs, row_threads;
  float eps, inverse_dim;
};

// Of any row.
struct NormAnyLaunch {
  cpu::RmsNormQuantParams p;
  int64_t rows;
  int row_threads;
  float inverse_dim;
  bool packs, weight_packs, code_packs;
};

// What the warps of a block found: sums of the tree's warps, ranges of the real ones.
struct NormScratch {
  float sums[kMaxWarps];
  uint2 ranges[32];
};

template <int kSize>
__device__ __forceinline__ float add_squares(float sum, const float (&v)[kSize]) {
#pragma unroll
  for (int j = 0; j < kSize; ++j) sum = __fmaf_rn(v[j], v[j], sum);
  return sum;
}

// Sums of the packs that a thread holds, pack group.thread + k * group.threads in slot k, to the
// sum of the row. With kRange also the range of the row, behind the same barrier. Once per kernel.
struct SumAndRange {
  float sum;
  RowRange range;
};
template <int kPacks, bool kRange>
__device__ __forceinline__ SumAndRange reduce_row(const RowGroup& group, float (&s)[kPacks],
                                                  const RowRange& range, bool symmetric,
                                                  NormScratch& scratch) {
  static_assert(kPacks == 1 || kPacks == 2 || kPacks == 4, "a power of two of slots");
  const int lane = threadIdx.x % 32, threads = group.threads;
  uint2 bits{};
  if (kRange) bits = max_over_lanes(range_bits(range), min(threads, 32), symmetric);
  if (threads < 32) {  // all slots belong to one warp of the tree
#pragma unroll
    for (int k = kPacks / 2; k > 0; k /= 2)
#pragma unroll
      for (int j = 0; j < k; ++j) s[j] += s[j + k];
#pragma unroll
    for (int other = 16; other > 0; other >>= 1)
      if (other < threads) s[0] += __shfl_xor_sync(kAllLanes, s[0], other);
    return {s[0], range_of_bits(bits)};
  }
  // Slot k is warp k * group.warps + w of the tree. The first steps of the butterflies halve the
  // number of slots a lane looks after: lanes with the bit clear keep the lower ones.
  int other = 16;
#pragma unroll
  for (int k = kPacks / 2; k > 0; k /= 2, other /= 2) {
    const bool upper = lane & other;
#pragma unroll
    for (int j = 0; j < k; ++j) {
      const float give = upper ? s[j] : s[j + k], keep = upper ? s[j + k] : s[j];
      s[j] = keep + __shfl_xor_sync(kAllLanes, give, other);
    }
  }
#pragma unroll
  for (; other > 0; other /= 2) s[0] += __shfl_xor_sync(kAllLanes, s[0], other);
  constexpr int kLanes = 32 / kPacks;  // that now hold the same slot
  const int warps = kPacks * group.warps;
  float* sums = scratch.sums + group.row * warps;
  if (lane % kLanes == 0)
    sums[lane / kLanes * group.warps + threadIdx.x / 32 - group.row * group.warps] = s[0];
  if (kRange && lane == 0) scratch.ranges[threadIdx.x / 32] = bits;
  if (warps == 1) return {s[0], range_of_bits(bits)};
  if (blockDim.x > 32) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  const int span = warps > 32 ? 32 : 1 << (32 - __clz(warps - 1)), mine = lane & (span - 1);
  float sum = mine < warps ? sums[mine] : 0.0f;
  if (mine + 32 < warps) sum += sums[mine + 32];
#pragma unroll
  for (int step = 16; step > 0; step >>= 1)
    if (step < span) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (kRange)
    bits = max_over_lanes(scratch.ranges[group.row * group.warps + min(lane, group.warps - 1)], 32,
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

// Are the symmetric codes of a row whose largest magnitude has the bits `top` CodeMode::near ones?
// The same on every path.
__device__ __forceinline__ bool norm_is_near(uint32_t top, float inv) {
  return QuickCodes::fits(top) && inv != 0.0f;
}

// Codes of the row of x * weight. `inv` is only a factor of the scale; where it is 0 (a sum beyond
// fp32) the row is one of zeros. One thread of the row writes what belongs to the row.
__device__ __forceinline__ RowCodes norm_codes(const RowRange& range, float inv, float* scale,
                                               int32_t* zeros, int64_t r, bool owner) {
  RowRange all = range;
  if (inv == 0.0f && range.top < INFINITY && range.bottom > -INFINITY) all = RowRange{};
  RowCodes codes = row_codes(all, zeros != nullptr);
  const bool near = !zeros && norm_is_near(range_bits(all).x, inv);
  codes.mode = near ? CodeMode::near : CodeMode::full;
  if (owner) {
    const bool no_codes = codes.low == codes.high;  // scale 1 or NaN
    scale[r] = no_codes ? codes.scale : codes.scale * inv;
    if (zeros) zeros[r] = codes.zero;
  }
  return codes;
}

// norm_any.cu: the path for any row.
int launch_norm_any(const NormAnyLaunch& a, int rows_per_block, void* stream);

}  // namespace fastinfer::cuda
