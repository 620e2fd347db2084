// RMS norm of rows, with residual addition and with int8 output:
//
//   y = x / sqrt(mean(x^2) + eps) * weight      fp32 arithmetic, one rounding
//   residual: residual = round(residual + x), and that sum is normalised
//   kQuant: y stays fp32 and becomes int8 codes (common/quantize_row.cuh)
//
// Rows x [rows, D], residual, out with strides (cpu/rows.h); weight [D] of any float type.
//
// A row belongs to a group of threads (common/row_group.h), chosen by D alone, and every thread
// sums its packs of 16 bytes in the same order on both paths: a row's bits depend on nothing but
// the row.
//   in registers   rows of at most 1024 * kNormPacks packs (16384 elements of a 16-bit type),
//   aligned,
//                  weight of x's type: read once, kept between the sum and the output
//   any row        walked pack by pack, read again for the output
#pragma once

#include "../../cpu/norm.h"
#include "../common/quantize_row.cuh"

namespace fastinfer::cuda {

constexpr int kNormPacks = 2;

struct NormLaunch {
  cpu::RmsNormQuantParams p;
  int64_t rows;
  int row_threads, rows_per_block;
  bool packs, weight_packs, code_packs;
};

struct NormScratch {
  RowScratch<float> sums;
  RowScratch<uint2> ranges;
};

__device__ __forceinline__ float inverse_norm(RowGroup& group, float squares, int dim, float eps,
                                              NormScratch& scratch) {
  const auto add = [](float a, float b) { return a + b; };
  const float sum = group.reduce(squares, scratch.sums, add);
  return rsqrtf(__fdiv_rn(sum, static_cast<float>(dim)) + eps);
}

template <int kSize>
__device__ __forceinline__ float add_squares(float sum, const float (&v)[kSize]) {
#pragma unroll
  for (int j = 0; j < kSize; ++j) sum = __fmaf_rn(v[j], v[j], sum);
  return sum;
}

template <class E>
__device__ __forceinline__ Pack<E> sum_of(const Pack<E>& a, const Pack<E>& b) {
  float u[Pack<E>::kSize], v[Pack<E>::kSize];
  unpack(u, a);
  unpack(v, b);
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
  __shared__ NormScratch scratch;
  RowGroup group(a.row_threads);
  const int64_t r = static_cast<int64_t>(blockIdx.x) * a.rows_per_block + group.row;
  constexpr int kSize = Pack<E>::kSize;
  const cpu::RmsNormParams& p = a.p.norm;
  const int dim = static_cast<int>(p.dim), step = a.row_threads * kSize;
  const int first = group.thread * kSize;
  const bool active = r < a.rows;
  const auto at = [&](const void* row, int k) {
    return reinterpret_cast<uint4*>(const_cast<void*>(row)) + group.thread + k * a.row_threads;
  };
  const auto holds = [&](int k) { return first + k * step < dim; };

  // Weights are there before the launch of the graph that this kernel is part of.
  Pack<E> weight[kNormPacks] = {}, x[kNormPacks] = {};
#pragma unroll
  for (int k = 0; k < kNormPacks; ++k)
    if (holds(k)) *reinterpret_cast<uint4*>(&weight[k]) = *at(p.weight, k);
  grid_wait();
  if (active) {
    const E* row = static_cast<const E*>(p.x.data) + row_offset_of(p.shape, p.x, r);
#pragma unroll
    for (int k = 0; k < kNormPacks; ++k)
      if (holds(k)) *reinterpret_cast<uint4*>(&x[k]) = *at(row, k);
    if (p.residual.data) {
      E* residual = static_cast<E*>(p.residual.data) + row_offset_of(p.shape, p.residual, r);
      Pack<E> add[kNormPacks] = {};
#pragma unroll
      for (int k = 0; k < kNormPacks; ++k)
        if (holds(k)) *reinterpret_cast<uint4*>(&add[k]) = *at(residual, k);
#pragma unroll
      for (int k = 0; k < kNormPacks; ++k) {
        x[k] = sum_of(x[k], add[k]);
        if (holds(k)) *at(residual, k) = *reinterpret_cast<const uint4*>(&x[k]);
      }
    }
  }
  grid_launch_dependents();
  float squares = 0.0f;
#pragma unroll
  for (int k = 0; k < kNormPacks; ++k) {
    float v[kSize];
    unpack(v, x[k]);
    squares = add_squares(squares, v);
  }
  const float inv = inverse_norm(group, squares, dim, p.eps, scratch);

  float y[kNormPacks][kSize];
#pragma unroll
  for (int k = 0; k < kNormPacks; ++k) {
    float w[kSize];
    unpack(w, weight[k]);
    unpack(y[k], x[k]);
#pragma unroll
    for (int j = 0; j < kSize; ++j) y[k][j] = y[k][j] * inv * w[j];
  }
  if constexpr (kQuant) {
    RowRange range;
#pragma unroll
    for (int k = 0; k < kNormPacks; ++k)
      if (active && holds(k)) range.add(y[k]);
    const RowCodes codes = norm_codes(a, group, range, active, r, scratch);
    if (!active) return;
    int8_t* q = a.p.q + r * dim;
    with_mode(codes.mode, [&](auto tag) {
#pragma unroll
      for (int k = 0; k < kNormPacks; ++k)
        if (holds(k))
          codes.template store<decltype(tag)::mode>(q, first + k * step, dim, true, y[k]);
    });
  } else if (active) {
    E* out = static_cast<E*>(p.out.data) + row_offset_of(p.shape, p.out, r);
#pragma unroll
    for (int k = 0; k < kNormPacks; ++k) {
      const Pack<E> pack = pack_of<E>(y[k]);
      if (holds(k)) *at(out, k) = *reinterpret_cast<const uint4*>(&pack);
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
    NormLaunch a{p, rows, layout.threads, layout.rows_per_block, true, true, true};
    a.packs = row_packs(n.shape, n.x, n.dim, sizeof(E));
    if (n.residual.data) a.packs = a.packs && row_packs(n.shape, n.residual, n.dim, sizeof(E));
    if (!kQuant) a.packs = a.packs && row_packs(n.shape, n.out, n.dim, sizeof(E));
    a.weight_packs = packs_fit(n.weight, n.dim, sizeof(E), {});
    a.code_packs = reinterpret_cast<uintptr_t>(p.q) % kSize == 0 && n.dim % kSize == 0;
    const bool in_registers = a.packs && a.weight_packs && a.code_packs &&
                              n.weight_dtype == n.dtype &&
                              packs <= int64_t{layout.threads} * kNormPacks;
    const auto blocks = static_cast<unsigned>(ceil_div(rows, layout.rows_per_block));
    const int block = layout.threads * layout.rows_per_block;
    if (in_registers) return launch(norm_kernel<E, kQuant>, blocks, block, 0, stream, a);
    return launch_norm_any(a, blocks, block, stream);
  });
}

}  // namespace fastinfer::cuda
