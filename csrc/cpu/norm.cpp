// y = x / sqrt(mean(x^2) + eps) * weight, one row at a time, all arithmetic in fp32 (Zhang &
// Sennrich 2019). With a residual: residual <- x + residual (rounded to its dtype, as the next
// layer will read it), then y from that sum. A row's sum of squares runs over kLanes partial sums
// added in a fixed tree order: the result depends on the row alone.
#include "norm.h"

#include "simd.h"

namespace fastinfer::cpu::FI_ISA {
namespace {

inline char* row_of(const Rows& t, int64_t r, int64_t inner, int64_t size) {
  return static_cast<char*>(t.data) +
         ((r / inner) * t.outer_stride + (r % inner) * t.inner_stride) * size;
}

template <class E, class W>
void norm_rows(const RmsNormParams& p, int64_t begin, int64_t end) {
  const int64_t full = p.dim / kLanes * kLanes, tail = p.dim - full;
  for (int64_t r = begin; r < end; ++r) {
    const char* x = row_of(p.x, r, p.inner, E::size);
    char* y = row_of(p.out, r, p.inner, E::size);
    if (p.residual.data) {
      char* res = row_of(p.residual, r, p.inner, E::size);
      for (int64_t i = 0; i < full; i += kLanes) E::store(res, i, E::load(x, i) + E::load(res, i));
      for (int64_t i = full; i < p.dim; ++i) E::set(res, i, E::get(x, i) + E::get(res, i));
      x = res;
    }
    vf squares{};
    for (int64_t i = 0; i < full; i += kLanes) {
      const vf v = E::load(x, i);
      squares += v * v;
    }
    const vf last = load_partial<E>(x, full, tail);
    squares += last * last;
    const float inv = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(p.dim) + p.eps);
    for (int64_t i = 0; i < full; i += kLanes)
      E::store(y, i, E::load(x, i) * inv * W::load(p.weight, i));
    store_partial<E>(y, full, tail, last * inv * load_partial<W>(p.weight, full, tail));
  }
}

}  // namespace

void rms_norm(const RmsNormParams& p, int64_t begin, int64_t end) {
  with_float(p.dtype, [&](auto e) {
    with_float(p.weight_dtype, [&](auto w) { norm_rows<decltype(e), decltype(w)>(p, begin, end); });
  });
}

}  // namespace fastinfer::cpu::FI_ISA
