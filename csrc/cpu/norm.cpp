// y = x / sqrt(mean(x^2) + eps) * weight, one row at a time, all arithmetic in fp32 (Zhang &
// Sennrich 2019). With a residual: residual <- x + residual (rounded to its dtype, as the next
// layer will read it), then y from that sum. The quantising form keeps y in fp32 and writes int8
// codes with one scale (and zero point) per row. A row's sum of squares runs over kLanes partial
// sums added in a fixed tree order: the result depends on the row alone.
#include "norm.h"

#include "quantize_row.h"
#include "simd.h"

namespace fastinfer::cpu::FI_ISA {
namespace {

// Adds the residual where there is one; returns the row to normalise.
template <class E>
const char* summed_row(const RmsNormParams& p, int64_t r, int64_t full) {
  const char* x = row_of(p.shape, p.x, r, E::size);
  if (!p.residual.data) return x;
  char* res = row_of(p.shape, p.residual, r, E::size);
  for (int64_t i = 0; i < full; i += kLanes) E::store(res, i, E::load(x, i) + E::load(res, i));
  for (int64_t i = full; i < p.dim; ++i) E::set(res, i, E::get(x, i) + E::get(res, i));
  return res;
}

// y (elements of type O, which may be x itself) = normalised x * weight.
template <class E, class W, class O>
void norm_row(const RmsNormParams& p, const char* x, char* y, int64_t full) {
  const int64_t tail = p.dim - full;
  vf squares{};
  for (int64_t i = 0; i < full; i += kLanes) {
    const vf v = E::load(x, i);
    squares += v * v;
  }
  const vf last = load_partial<E>(x, full, tail);
  squares += last * last;
  const float inv = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(p.dim) + p.eps);
  for (int64_t i = 0; i < full; i += kLanes)
    O::store(y, i, E::load(x, i) * inv * W::load(p.weight, i));
  store_partial<O>(y, full, tail, last * inv * load_partial<W>(p.weight, full, tail));
}

}  // namespace

void rms_norm(const RmsNormParams& p, int64_t begin, int64_t end) {
  const int64_t full = p.dim / kLanes * kLanes;
  with_float(p.dtype, [&](auto e) {
    with_float(p.weight_dtype, [&](auto w) {
      using E = decltype(e);
      for (int64_t r = begin; r < end; ++r)
        norm_row<E, decltype(w), E>(p, summed_row<E>(p, r, full),
                                    row_of(p.shape, p.out, r, E::size), full);
    });
  });
}

void rms_norm_quant(const RmsNormQuantParams& p, float* scratch, int64_t begin, int64_t end) {
  const int64_t dim = p.norm.dim, full = dim / kLanes * kLanes;
  with_float(p.norm.dtype, [&](auto e) {
    with_float(p.norm.weight_dtype, [&](auto w) {
      using E = decltype(e);
      for (int64_t r = begin; r < end; ++r) {
        norm_row<E, decltype(w), Elem<DType::f32>>(p.norm, summed_row<E>(p.norm, r, full),
                                                   reinterpret_cast<char*>(scratch), full);
        quantize_row(scratch, dim, p.q + r * dim, p.scale + r, p.zeros ? p.zeros + r : nullptr);
      }
    });
  });
}

}  // namespace fastinfer::cpu::FI_ISA
