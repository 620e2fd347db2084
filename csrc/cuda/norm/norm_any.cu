// Rows that norm.cuh does not keep in registers: unaligned, wider than a block's registers, or with
// a weight of another type than x's. Pack by pack in the same order, so with the same bits; the row
// is read again for every pass (from the caches, as a rule).
#include "norm.cuh"

namespace fastinfer::cuda {
namespace {

// The loops over a row, once for the usual way and once for the rest.
template <class F>
__device__ __forceinline__ void with_norm_mode(CodeMode mode, F&& f) {
  if (mode == CodeMode::near) return f(ModeTag<CodeMode::near>{});
  return f(ModeTag<CodeMode::full>{});
}

template <class E>
__global__ void __launch_bounds__(kMaxRowThreads)
    norm_any_kernel(const __grid_constant__ NormAnyLaunch a) {
  __shared__ NormScratch scratch;
  RowGroup group(a.row_threads);
  int64_t r = group.global_row();
  constexpr int kSize = Pack<E>::kSize;
  const cpu::RmsNormParams& p = a.p.norm;
  const int dim = static_cast<int>(p.dim), step = a.row_threads * kSize;
  const bool active = r < a.rows, symmetric = !a.p.zeros;
  const int first = active ? group.thread * kSize : dim;  // no work without a row
  r = active ? r : 0;
  grid_launch_dependents();
  grid_wait();
  const E* x = static_cast<const E*>(p.x.data) + row_offset_of(p.shape, p.x, r);
  E* residual = static_cast<E*>(p.residual.data);
  if (residual) residual += row_offset_of(p.shape, p.residual, r);
  const auto times_weight = [&](float(&y)[kSize], int i, float factor) {
    float w[kSize];
    load_floats(w, p.weight, p.weight_dtype, i, dim, a.weight_packs);
#pragma unroll
    for (int j = 0; j < kSize; ++j) y[j] = y[j] * factor * w[j];
  };

  float squares[2] = {};
  RowRange range;
  for (int i = first; i < dim; i += step) {
    uint4 pack = load_pack(x, i, dim, a.packs);
    if (residual) {
      pack = sum_of<E>(pack, load_pack(residual, i, dim, a.packs));
      store_pack(residual, i, dim, a.packs, pack);
    }
    float v[kSize];
    unpack<E>(v, pack);
    // Past 2 * kMaxRowThreads packs no other path has to give the same bits.
    const float sum = add_squares(0.0f, v);
    if (i == first) {
      squares[0] = sum;
    } else {
      squares[1] += sum;
    }
    if (a.p.q) {
      times_weight(v, i, 1.0f);
      range.add(v, symmetric);
    }
  }
  if (residual) x = residual;
  const SumAndRange all = reduce_row<2, true>(group, squares, range, symmetric, scratch);
  const float inv = rsqrtf(all.sum * a.inverse_dim + p.eps);
  if (a.p.q) {
    const RowCodes codes =
        norm_codes(all.range, inv, a.p.scale, a.p.zeros, r, active && group.thread == 0);
    int8_t* q = a.p.q + r * dim;
    with_norm_mode(codes.mode, [&](auto tag) {
      for (int i = first; i < dim; i += step) {
        float y[kSize];
        unpack<E>(y, load_pack(x, i, dim, a.packs));
        times_weight(y, i, 1.0f);
        codes.template store<decltype(tag)::mode>(q, i, dim, a.code_packs, y);
      }
    });
  } else {
    E* out = static_cast<E*>(p.out.data) + row_offset_of(p.shape, p.out, r);
    for (int i = first; i < dim; i += step) {
      float y[kSize];
      unpack<E>(y, load_pack(x, i, dim, a.packs));
      times_weight(y, i, inv);
      store_pack(out, i, dim, a.packs, pack_of<E>(y));
    }
  }
}

}  // namespace

int launch_norm_any(const NormAnyLaunch& a, int rows_per_block, void* stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(a.rows, rows_per_block));
  const int block = a.row_threads * rows_per_block;
  return with_float(a.p.norm.dtype, [&](auto element) {
    return launch(norm_any_kernel<decltype(element)>, blocks, block, 0, stream, a);
  });
}

}  // namespace fastinfer::cuda
