// Rows that norm.cuh does not keep in registers: unaligned, wider than a block's registers, or with
// a weight of another type than x's. Pack by pack in the same order, so with the same bits; the row
// is read again for every pass (from the caches, as a rule).
#include "norm.cuh"

namespace fastinfer::cuda {
namespace {

template <class E>
__global__ void __launch_bounds__(kMaxRowThreads)
    norm_any_kernel(const __grid_constant__ NormLaunch a) {
  __shared__ NormScratch scratch;
  RowGroup group(a.row_threads);
  int64_t r = static_cast<int64_t>(blockIdx.x) * a.rows_per_block + group.row;
  constexpr int kSize = Pack<E>::kSize;
  const cpu::RmsNormParams& p = a.p.norm;
  const int dim = static_cast<int>(p.dim), step = a.row_threads * kSize;
  const bool active = r < a.rows;
  const int first = active ? group.thread * kSize : dim;  // no work without a row
  r = active ? r : 0;
  grid_wait();
  const E* x = static_cast<const E*>(p.x.data) + row_offset_of(p.shape, p.x, r);
  float squares = 0.0f;
  if (p.residual.data) {
    E* residual = static_cast<E*>(p.residual.data) + row_offset_of(p.shape, p.residual, r);
    for (int i = first; i < dim; i += step) {
      const uint4 sum =
          sum_of<E>(load_row_pack(x, i, dim, a.packs), load_row_pack(residual, i, dim, a.packs));
      store_row_pack(residual, i, dim, a.packs, sum);
      float v[kSize];
      unpack<E>(v, sum);
      squares = add_squares(squares, v);
    }
    x = residual;
  } else {
    for (int i = first; i < dim; i += step) {
      float v[kSize];
      unpack<E>(v, load_row_pack(x, i, dim, a.packs));
      squares = add_squares(squares, v);
    }
  }
  grid_launch_dependents();
  const float inv = inverse_norm(a, sum_row(group, squares, scratch));
  const auto for_packs = [&](auto&& f) {
    for (int i = first; i < dim; i += step) {
      float y[kSize], w[kSize];
      unpack<E>(y, load_row_pack(x, i, dim, a.packs));
      load_floats(w, p.weight, p.weight_dtype, i, dim, a.weight_packs);
#pragma unroll
      for (int j = 0; j < kSize; ++j) y[j] = y[j] * inv * w[j];
      f(i, y);
    }
  };
  if (a.p.q) {
    RowRange range;
    for_packs([&](int, const float(&y)[kSize]) { range.add(y); });
    const RowCodes codes = norm_codes(a, group, range, active, r, scratch);
    int8_t* q = a.p.q + r * dim;
    with_mode(codes.mode, [&](auto tag) {
      for_packs([&](int i, const float(&y)[kSize]) {
        codes.template store<decltype(tag)::mode>(q, i, dim, a.code_packs, y);
      });
    });
  } else {
    E* out = static_cast<E*>(p.out.data) + row_offset_of(p.shape, p.out, r);
    for_packs([&](int i, const float(&y)[kSize]) {
      store_row_pack(out, i, dim, a.packs, pack_of<E>(y));
    });
  }
}

}  // namespace

int launch_norm_any(const NormLaunch& a, unsigned blocks, int block, void* stream) {
  return with_float(a.p.norm.dtype, [&](auto element) {
    return launch(norm_any_kernel<decltype(element)>, blocks, block, 0, stream, a);
  });
}

}  // namespace fastinfer::cuda
