// The kernel of norm.cuh for rows of 16-bit elements in registers, and the choice between it and
// the one for any row. kPacks: 2, and 4 where there are many rows without a residual.
#pragma once

#include "norm.cuh"
#include "norm_few.cuh"

namespace fastinfer::cuda {

template <class E, bool kQuant, int kPacks>
__global__ void __launch_bounds__(kMaxRowThreads)
    norm_kernel(const __grid_constant__ NormLaunch a) {
  constexpr int kSize = Pack<E>::kSize;
  __shared__ NormScratch scratch;
  const RowGroup group(a.row_threads);
  const uint32_t r = static_cast<uint32_t>(group.global_row());
  const int packs = r < a.rows ? a.packs : 0;
  uint32_t outer = 0, inner = r;
  if (a.inner) outer = r / a.inner, inner = r - outer * a.inner;
  const auto row_at = [&](const void* base, const int64_t(&stride)[2]) {
    return reinterpret_cast<uint4*>(static_cast<E*>(const_cast<void*>(base)) + outer * stride[0] +
                                    inner * stride[1]) +
           group.thread;
  };
  const auto holds = [&](int k) { return group.thread + k * group.threads < packs; };

  // Weights are there before the launch of the graph that this kernel is part of.
  const uint4* weights = static_cast<const uint4*>(a.weight) + group.thread;
  uint4 weight[kPacks] = {}, x[kPacks] = {};
#pragma unroll
  for (int k = 0; k < kPacks; ++k)
    if (holds(k)) weight[k] = weights[k * group.threads];
  grid_launch_dependents();
  grid_wait();
  const uint4* row = row_at(a.x, a.x_stride);
#pragma unroll
  for (int k = 0; k < kPacks; ++k)
    if (holds(k)) x[k] = row[k * group.threads];
  if (a.residual) {
    uint4* residual = row_at(a.residual, a.residual_stride);
    uint4 add[kPacks] = {};
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (holds(k)) add[k] = residual[k * group.threads];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      x[k] = sum_of<E>(x[k], add[k]);
      if (holds(k)) residual[k * group.threads] = x[k];
    }
  }
  const bool symmetric = !kQuant || !a.zeros;
  float squares[kPacks];
  RowRange range;
  float y[kPacks][kSize];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    unpack<E>(y[k], x[k]);
    squares[k] = add_squares(0.0f, y[k]);
    if constexpr (kQuant) {
      float w[kSize];
      unpack<E>(w, weight[k]);
#pragma unroll
      for (int j = 0; j < kSize; ++j) y[k][j] *= w[j];
      range.add(y[k], symmetric);
    }
  }
  const SumAndRange all = reduce_row<kPacks, kQuant>(group, squares, range, symmetric, scratch);
  const float inv = rsqrtf(all.sum * a.inverse_dim + a.eps);
  if constexpr (!kQuant) {
    uint4* out = row_at(a.out, a.out_stride);
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      float w[kSize];
      unpack<E>(w, weight[k]);
      unpack<E>(y[k], x[k]);  // again: cheaper than to keep them
#pragma unroll
      for (int j = 0; j < kSize; ++j) y[k][j] = y[k][j] * inv * w[j];
      if (holds(k)) out[k * group.threads] = pack_of<E>(y[k]);
    }
  } else {
    int8_t* q = static_cast<int8_t*>(a.out) + static_cast<int64_t>(r) * (a.packs * kSize);
    const bool owner = r < a.rows && group.thread == 0;
    const uint32_t top = range_bits(all.range).x;
    if (symmetric && norm_is_near(top, inv)) {
      const QuickCodes codes(top);
      if (owner) a.scale[r] = codes.scale * inv;
#pragma unroll
      for (int k = 0; k < kPacks; ++k)
        if (holds(k))
          reinterpret_cast<uint2*>(q)[group.thread + k * group.threads] =
              codes.template words<true>(y[k]);
      return;
    }
    const RowCodes codes = norm_codes(all.range, inv, a.scale, a.zeros, r, owner);
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (holds(k))
        codes.template store<CodeMode::full>(q, (group.thread + k * group.threads) * kSize, 0, true,
                                             y[k]);
  }
}

// Rows of at most 32 packs share a warp (a power of two of threads each), longer ones have whole
// warps.
template <class E, bool kQuant, int kPacks>
int launch_norm_rows(NormLaunch a, void* stream) {
  const RowLayout layout = row_layout(a.packs, a.packs <= 32 ? kPacks : 1);
  int threads = layout.threads;
  if (a.packs > 32) threads = static_cast<int>(ceil_div(ceil_div(a.packs, kPacks), 32) * 32);
  const int rows_per_block =
      threads < kMinBlock && (threads & (threads - 1)) == 0 ? kMinBlock / threads : 1;
  a.row_threads = threads;
  return launch(norm_kernel<E, kQuant, kPacks>,
                static_cast<unsigned>(ceil_div(a.rows, rows_per_block)), threads * rows_per_block,
                0, stream, a);
}

template <bool kQuant>
int launch_norm(const cpu::RmsNormQuantParams& p, int64_t rows, void* stream) {
  const cpu::RmsNormParams& n = p.norm;
  return with_float(n.dtype, [&](auto element) {
    using E = decltype(element);
    constexpr int kSize = Pack<E>::kSize;
    const int64_t packs = ceil_div(n.dim, kSize);
    const float inverse_dim = 1.0f / static_cast<float>(n.dim);
    NormAnyLaunch any{p, rows, 0, inverse_dim, true, true, true};
    any.packs = row_packs(n.shape, n.x, n.dim, sizeof(E));
    if (n.residual.data) any.packs = any.packs && row_packs(n.shape, n.residual, n.dim, sizeof(E));
    if (!kQuant) any.packs = any.packs && row_packs(n.shape, n.out, n.dim, sizeof(E));
    any.weight_packs = packs_fit(n.weight, n.dim, sizeof(E), {});
    any.code_packs = reinterpret_cast<uintptr_t>(p.q) % kSize == 0 && n.dim % kSize == 0;
    if (sizeof(E) == 4 || !any.packs || !any.weight_packs || !any.code_packs ||
        n.weight_dtype != n.dtype || n.shape.ndim > 2 || rows > INT32_MAX || packs > kMaxPacks) {
      const RowLayout layout = row_layout(packs, 1);
      any.row_threads = layout.threads;
      return launch_norm_any(any, layout.rows_per_block, stream);
    }
    if constexpr (sizeof(E) == 2) {
      NormLaunch a{};
      a.x = n.x.data, a.weight = n.weight, a.residual = n.residual.data;
      a.out = kQuant ? p.q : n.out.data, a.scale = p.scale, a.zeros = p.zeros;
      const bool two = n.shape.ndim == 2;
      for (int d = 0; d < 2; ++d) {
        const int from = two ? d : 0;
        a.x_stride[d] = n.x.stride[from], a.residual_stride[d] = n.residual.stride[from];
        a.out_stride[d] = n.out.stride[from];
      }
      a.rows = static_cast<uint32_t>(rows);
      a.inner = two ? static_cast<uint32_t>(n.shape.size[1]) : 0;
      a.packs = static_cast<int32_t>(packs), a.eps = n.eps, a.inverse_dim = inverse_dim;
      // A float row without a residual has as little code in the general kernel.
      if ((kQuant || a.residual) && !a.zeros && !a.inner && packs > 32 && packs <= kMaxRowThreads &&
          rows <= device_facts().sms)
        return launch_norm_few<E, kQuant>(a, stream);
      // Many rows: four packs per thread. A residual doubles what is under way anyway.
      if (!a.residual && rows * packs > int64_t{2048} * device_facts().sms)
        return launch_norm_rows<E, kQuant, 4>(a, stream);
      return launch_norm_rows<E, kQuant, 2>(a, stream);
    }
    return 0;
  });
}

}  // namespace fastinfer::cuda
