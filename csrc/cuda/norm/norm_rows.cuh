// The kernel of norm.cuh for rows in registers, and the choice between it and the one for any row.
#pragma once

#include "norm.cuh"

namespace fastinfer::cuda {

template <class E, bool kQuant>
__global__ void __launch_bounds__(kMaxRowThreads)
    norm_kernel(const __grid_constant__ NormLaunch a) {
  constexpr int kSize = Pack<E>::kSize, kPacks = kQuant ? 2 * kNormPacks : kNormPacks;
  __shared__ NormScratch scratch;
  RowGroup group(a.threads);
  const int64_t r = group.global_row();
  const int packs = a.dim / kSize;
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
  int64_t outer = 0, inner = r;
  if (a.inner) outer = divide(r, a.inner), inner = r - outer * a.inner;
  const auto row_at = [&](void* base, const int64_t(&stride)[2]) {
    return static_cast<E*>(base) + outer * stride[0] + inner * stride[1];
  };

  // Weights are there before the launch of the graph that this kernel is part of.
  uint4 weight[kPacks] = {}, x[kPacks] = {};
#pragma unroll
  for (int k = 0; k < kPacks; ++k)
    if (holds(k)) weight[k] = *at(a.weight, k);
  grid_wait();
  if (active) {
    const E* row = row_at(const_cast<void*>(a.x), a.x_stride);
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (holds(k)) x[k] = *at(row, k);
    if (a.residual) {
      E* residual = row_at(a.residual, a.residual_stride);
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
    if (kQuant && k % 2 == 1 && !paired) continue;
    float v[kSize];
    unpack<E>(v, x[k]);
    float& sum = squares[kQuant ? k % 2 : 0];
    sum = add_squares(sum, v);
  }
  if constexpr (!kQuant) {
    const float inv = rsqrtf(sum_row(group, squares[0], scratch) * a.inverse_dim + a.eps);
    if (!active) return;
    E* out = row_at(a.out, a.out_stride);
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      float y[kSize], w[kSize];
      unpack<E>(w, weight[k]);
      unpack<E>(y, x[k]);
#pragma unroll
      for (int j = 0; j < kSize; ++j) y[j] = y[j] * inv * w[j];
      if (holds(k)) *at(out, k) = pack_of<E>(y);
    }
  } else {
    const bool symmetric = !a.zeros;
    RowRange range;
    float y[kPacks][kSize];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (k % 2 == 1 && !paired) continue;
      float w[kSize];
      unpack<E>(w, weight[k]);
      unpack<E>(y[k], x[k]);
#pragma unroll
      for (int j = 0; j < kSize; ++j) y[k][j] *= w[j];
      range.add(y[k], symmetric);
    }
    const SumAndRange all =
        reduce_both(group, squares[0], squares[1], range, paired, symmetric, scratch);
    const float inv = rsqrtf(all.sum * a.inverse_dim + a.eps);
    const RowCodes codes =
        norm_codes(all.range, inv, a.scale, a.zeros, r, active && group.thread == 0);
    if (!active) return;
    int8_t* q = static_cast<int8_t*>(a.out) + r * a.dim;
    with_mode(codes.mode, [&](auto tag) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k)
        if (holds(k))
          codes.template store<decltype(tag)::mode>(q, pack_at(k) * kSize, a.dim, true, y[k]);
    });
  }
}

template <bool kQuant>
int launch_norm(const cpu::RmsNormQuantParams& p, int64_t rows, void* stream) {
  const cpu::RmsNormParams& n = p.norm;
  return with_float(n.dtype, [&](auto element) {
    using E = decltype(element);
    constexpr int kSize = Pack<E>::kSize;
    const int64_t packs = ceil_div(n.dim, kSize);
    const RowLayout layout = row_layout(packs, kNormPacks);
    const float inverse_dim = 1.0f / static_cast<float>(n.dim);
    NormAnyLaunch any{p,    rows, layout.threads, layout.rows_per_block, inverse_dim,
                      true, true, true};
    any.packs = row_packs(n.shape, n.x, n.dim, sizeof(E));
    if (n.residual.data) any.packs = any.packs && row_packs(n.shape, n.residual, n.dim, sizeof(E));
    if (!kQuant) any.packs = any.packs && row_packs(n.shape, n.out, n.dim, sizeof(E));
    any.weight_packs = packs_fit(n.weight, n.dim, sizeof(E), {});
    any.code_packs = reinterpret_cast<uintptr_t>(p.q) % kSize == 0 && n.dim % kSize == 0;
    const auto blocks = static_cast<unsigned>(ceil_div(rows, layout.rows_per_block));
    const bool in_registers = any.packs && any.weight_packs && any.code_packs &&
                              n.weight_dtype == n.dtype && n.shape.ndim <= 2 &&
                              n.shape.size[n.shape.ndim - 1] <= UINT32_MAX &&
                              packs <= int64_t{layout.threads} * kNormPacks;
    if (!in_registers)
      return launch_norm_any(any, blocks, layout.threads * layout.rows_per_block, stream);
    NormLaunch a{};
    a.x = n.x.data, a.weight = n.weight, a.residual = n.residual.data;
    a.out = kQuant ? p.q : n.out.data, a.scale = p.scale, a.zeros = p.zeros;
    const bool two = n.shape.ndim == 2;
    for (int d = 0; d < 2; ++d) {
      const int from = two ? d : 0;
      a.x_stride[d] = n.x.stride[from], a.residual_stride[d] = n.residual.stride[from];
      a.out_stride[d] = n.out.stride[from];
    }
    a.rows = rows, a.inner = two ? static_cast<uint32_t>(n.shape.size[1]) : 0;
    a.dim = static_cast<int32_t>(n.dim), a.eps = n.eps, a.inverse_dim = inverse_dim;
    a.row_threads = a.threads = static_cast<uint16_t>(layout.threads);
    if (kQuant && layout.threads >= 128 && layout.threads % 64 == 0 &&
        rows > 2 * device_facts().sms)
      a.threads /= 2;
    return launch(norm_kernel<E, kQuant>, blocks, a.threads * layout.rows_per_block, 0, stream, a);
  });
}

}  // namespace fastinfer::cuda
