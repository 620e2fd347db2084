// RMS norm of rows, with residual addition and with int8 output:
//
//   y = x / sqrt(mean(x^2) + eps) * weight      fp32 arithmetic, one rounding
//   residual: residual = round(residual + x), and that sum is normalised
//   kQuant: y stays fp32 and becomes int8 codes (common/quantize_row.cuh)
//
// Rows x [rows, D], residual, out with strides (cpu/rows.h); weight [D] of any float type.
//
// A row belongs to a group of threads (common/row_group.h), chosen by D alone, and every thread
// sums its packs of 16 bytes in the same order on all paths: a row's bits depend on nothing but the
// row.
//   in registers   rows of at most 1024 * 2 packs (16384 elements of a 16-bit type), aligned,
//   weight of
//                  x's type: read once, kept between the sum and the output
//   any row        norm_any.cu: walked pack by pack, read again for the output
// With many rows the int8 form lets a thread do the work of two of the group (t and t + threads /
// 2), with a sum of its own for each: the same tree, half the reductions and scales per element.
#pragma once

#include "../../cpu/norm.h"
#include "../common/quantize_row.cuh"

namespace fastinfer::cuda {

constexpr int kNormPacks = 2;  // of a thread of the group

struct NormLaunch {
  cpu::RmsNormQuantParams p;
  int64_t rows;
  int row_threads, threads, rows_per_block;  // of the group; in fact; rows
  float inverse_dim;
  bool packs, weight_packs, code_packs;
};

struct NormScratch {
  RowScratch<float> sums;
  RowScratch<uint2> ranges;
};

__device__ __forceinline__ float inverse_norm(const NormLaunch& a, float sum) {
  return rsqrtf(sum * a.inverse_dim + a.p.norm.eps);
}

__device__ __forceinline__ float sum_row(RowGroup& group, float sum, NormScratch& scratch) {
  return group.reduce(sum, scratch.sums, [](float x, float y) { return x + y; });
}

// sum_row over a group of twice as many threads: this one's sums stand for those of thread t and of
// thread t + threads. One row per block.
__device__ __forceinline__ float sum_row_of_pairs(const RowGroup& group, float low, float high,
                                                  NormScratch& scratch) {
#pragma unroll
  for (int lane = 16; lane > 0; lane >>= 1) {
    low += __shfl_xor_sync(kAllLanes, low, lane);
    high += __shfl_xor_sync(kAllLanes, high, lane);
  }
  float* values = scratch.sums.value[0];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = 2 * group.warps;
  if (lane == 0) values[warp] = low, values[group.warps + warp] = high;
  __syncthreads();
  const int span = 1 << (32 - __clz(warps - 1)), mine = lane & (span - 1);
  float sum = mine < warps ? values[mine] : 0.0f;
#pragma unroll
  for (int other = 16; other > 0; other >>= 1)
    if (other < span) sum += __shfl_xor_sync(kAllLanes, sum, other);
  return sum;
}

template <int kSize>
__device__ __forceinline__ float add_squares(float sum, const float (&v)[kSize]) {
#pragma unroll
  for (int j = 0; j < kSize; ++j) sum = __fmaf_rn(v[j], v[j], sum);
  return sum;
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

__device__ __forceinline__ RowCodes norm_codes(const NormLaunch& a, RowGroup& group, RowRange range,
                                               bool active, int64_t r, NormScratch& scratch) {
  const RowCodes codes =
      row_codes(reduce_range(group, range, !a.p.zeros, scratch.ranges), a.p.zeros != nullptr);
  if (active && group.thread == 0) {
    a.p.scale[r] = codes.scale;
    if (a.p.zeros) a.p.zeros[r] = codes.zero;
  }
  return codes;
}

template <class E, bool kQuant>
__global__ void __launch_bounds__(kMaxRowThreads)
    norm_kernel(const __grid_constant__ NormLaunch a) {
  constexpr int kSize = Pack<E>::kSize, kPacks = kQuant ? 2 * kNormPacks : kNormPacks;
  __shared__ NormScratch scratch;
  RowGroup group(a.threads);
  const int64_t r = static_cast<int64_t>(blockIdx.x) * a.rows_per_block + group.row;
  const cpu::RmsNormParams& p = a.p.norm;
  const int dim = static_cast<int>(p.dim), packs = dim / kSize;
  const bool active = r < a.rows, paired = kQuant && a.threads < a.row_threads;
  // Slot k of this thread: pack k of thread t of the group; where a thread does the work of two,
  // the odd slots are those of the second.
  const auto pack_at = [&](int k) {
    if (!kQuant) return group.thread + k * a.row_threads;
    return group.thread + k / 2 * a.row_threads + k % 2 * a.threads;
  };
  const auto holds = [&](int k) { return pack_at(k) < packs && (!kQuant || k % 2 == 0 || paired); };
  const auto at = [&](const void* row, int k) {
    return reinterpret_cast<uint4*>(const_cast<void*>(row)) + pack_at(k);
  };

  // Weights are there before the launch of the graph that this kernel is part of.
  uint4 weight[kPacks] = {}, x[kPacks] = {};
#pragma unroll
  for (int k = 0; k < kPacks; ++k)
    if (holds(k)) weight[k] = *at(p.weight, k);
  grid_wait();
  if (active) {
    const E* row = static_cast<const E*>(p.x.data) + row_offset_of(p.shape, p.x, r);
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (holds(k)) x[k] = *at(row, k);
    if (p.residual.data) {
      E* residual = static_cast<E*>(p.residual.data) + row_offset_of(p.shape, p.residual, r);
      uint4 add[kPacks] = {};
#pragma unroll
      for (int k = 0; k < kPacks; ++k)
        if (holds(k)) add[k] = *at(residual, k);
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        x[k] = sum_of<E>(x[k], add[k]);
        if (holds(k)) *at(residual, k) = x[k];
      }
    }
  }
  grid_launch_dependents();
  float squares[2] = {};
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    float v[kSize];
    unpack<E>(v, x[k]);
    float& sum = squares[kQuant ? k % 2 : 0];
    sum = add_squares(sum, v);
  }
  const float sum = paired ? sum_row_of_pairs(group, squares[0], squares[1], scratch)
                           : sum_row(group, squares[0], scratch);
  const float inv = inverse_norm(a, sum);

  float y[kPacks][kSize];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    float w[kSize];
    unpack<E>(w, weight[k]);
    unpack<E>(y[k], x[k]);
#pragma unroll
    for (int j = 0; j < kSize; ++j) y[k][j] = y[k][j] * inv * w[j];
  }
  if constexpr (kQuant) {
    RowRange range;
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (active && holds(k)) range.add(y[k]);
    const RowCodes codes = norm_codes(a, group, range, active, r, scratch);
    if (!active) return;
    int8_t* q = a.p.q + r * dim;
    with_mode(codes.mode, [&](auto tag) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k)
        if (holds(k))
          codes.template store<decltype(tag)::mode>(q, pack_at(k) * kSize, dim, true, y[k]);
    });
  } else if (active) {
    E* out = static_cast<E*>(p.out.data) + row_offset_of(p.shape, p.out, r);
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (holds(k)) *at(out, k) = pack_of<E>(y[k]);
    }
  }
}

// norm_any.cu: the path for any row.
int launch_norm_any(const NormLaunch& a, unsigned blocks, int block, void* stream);

template <bool kQuant>
int launch_norm(const cpu::RmsNormQuantParams& p, int64_t rows, void* stream) {
  const cpu::RmsNormParams& n = p.norm;
  return with_float(n.dtype, [&](auto element) {
    using E = decltype(element);
    constexpr int kSize = Pack<E>::kSize;
    const int64_t packs = ceil_div(n.dim, kSize);
    const RowLayout layout = row_layout(packs, kNormPacks);
    NormLaunch a{p,
                 rows,
                 layout.threads,
                 layout.threads,
                 layout.rows_per_block,
                 1.0f / static_cast<float>(n.dim),
                 true,
                 true,
                 true};
    a.packs = row_packs(n.shape, n.x, n.dim, sizeof(E));
    if (n.residual.data) a.packs = a.packs && row_packs(n.shape, n.residual, n.dim, sizeof(E));
    if (!kQuant) a.packs = a.packs && row_packs(n.shape, n.out, n.dim, sizeof(E));
    a.weight_packs = packs_fit(n.weight, n.dim, sizeof(E), {});
    a.code_packs = reinterpret_cast<uintptr_t>(p.q) % kSize == 0 && n.dim % kSize == 0;
    const bool in_registers = a.packs && a.weight_packs && a.code_packs &&
                              n.weight_dtype == n.dtype &&
                              packs <= int64_t{layout.threads} * kNormPacks;
    const auto blocks = static_cast<unsigned>(ceil_div(rows, layout.rows_per_block));
    if (kQuant && in_registers && layout.threads >= 128 && layout.threads % 64 == 0 &&
        rows > 2 * device_facts().sms)
      a.threads /= 2;
    const int block = a.threads * layout.rows_per_block;
    if (in_registers) return launch(norm_kernel<E, kQuant>, blocks, block, 0, stream, a);
    return launch_norm_any(a, blocks, block, stream);
  });
}

}  // namespace fastinfer::cuda
