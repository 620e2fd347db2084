// quantize_per_token: int8 rows, the rule of quantize_row.h; with a static scale q = clamp(rne(x /
// s)).
//
// quantize_weight: round to nearest per row and group of K, w ~ (q - z) s, q in [0, 2^b - 1].
//   symmetric   s = absmax / (2^(b-1) - 1),  z = 2^(b-1)            no value is clipped
//   asymmetric  s = (max - min) / (2^b - 1), z = clamp(rne(-min / s)),  min <= 0 <= max
//   s is rounded to its storage dtype first, then q = clamp(rne(w / s) + z). s that is 0 then (zero
//   or vanishing group) becomes 1; beyond the dtype's range it saturates; inf or NaN in the group
//   gives s = NaN and q = z.
#include "quantize.h"

#include "quantize_row.h"

namespace fastinfer::cpu::FI_ISA {
namespace {

template <class E>
void quantize_group(const char* w, int64_t n, const QuantizeWeightParams& p, uint8_t* codes,
                    int64_t slot) {
  vf low{}, high{}, poison{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const vf v = n - i >= kLanes ? E::load(w, i) : load_partial<E>(w, i, n - i);
    low = vmin(low, v);
    high = vmax(high, v);
    poison += v - v;
  }
  const float top = max(high), bottom = -max(-low), bad = sum(poison);
  const float middle = static_cast<float>(1 << (p.bits - 1)), last = 2.0f * middle - 1.0f;
  float s =
      p.zeros ? top / last - bottom / last : (top > -bottom ? top : -bottom) / (middle - 1.0f);
  const float largest = p.scale_dtype == DType::f16    ? 65504.0f
                        : p.scale_dtype == DType::bf16 ? 3.38953139e38f
                                                       : 3.40282347e38f;
  s = s > largest ? largest : s;
  with_float(p.scale_dtype, [&](auto e) {
    using S = decltype(e);
    S::set(p.scales, slot, s);
    s = S::get(p.scales, slot);
    if (s == 0.0f) S::set(p.scales, slot, s = 1.0f);
    if (bad != bad) S::set(p.scales, slot, s = __builtin_nanf(""));
  });
  float z = middle;
  if (p.zeros) {
    z = s == s ? __builtin_nearbyintf(-bottom / s) : middle;
    z = z > last ? last : z;
    p.zeros[slot] = static_cast<uint8_t>(z);
  }
  const vf vlow = splat((p.zeros ? 0.0f : 1.0f) - z), vhigh = splat(last - z), vs = splat(s);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i;
    vf t = (left >= kLanes ? E::load(w, i) : load_partial<E>(w, i, left)) / vs;
    t = t == t ? t : vf{};
    const vf q = vround(vmin(vmax(t, vlow), vhigh)) + z;
    const vb out = __builtin_convertvector(__builtin_convertvector(q, vi), vb);
    if (left >= kLanes)
      store_raw(codes + i, out);
    else
      for (int64_t j = 0; j < left; ++j) codes[i + j] = out[j];
  }
}

}  // namespace

void quantize_rows(const QuantizeRowsParams& p, int64_t begin, int64_t end) {
  with_float(p.dtype, [&](auto e) {
    using E = decltype(e);
    for (int64_t m = begin; m < end; ++m) {
      const char* x = static_cast<const char*>(p.x) + m * p.x_stride * E::size;
      int8_t* q = p.q + m * p.q_stride;
      if (p.static_scale) {
        p.scale[m] = *p.static_scale;
        quantize_row_with<E>(x, p.k, *p.static_scale, 0.0f, -127.0f, q);
      } else {
        quantize_row_as<E>(x, p.k, q, p.scale + m, p.zeros ? p.zeros + m : nullptr);
      }
    }
  });
}

void quantize_weight_rows(const QuantizeWeightParams& p, int64_t begin, int64_t end) {
  with_float(p.dtype, [&](auto e) {
    using E = decltype(e);
    for (int64_t n = begin; n < end; ++n) {
      const char* w = static_cast<const char*>(p.weight) + n * p.weight_stride * E::size;
      for (int64_t g = 0; g < p.groups; ++g) {
        const int64_t k = g * p.group_size, left = p.k - k;
        quantize_group<E>(w + k * E::size, left < p.group_size ? left : p.group_size, p,
                          p.codes + n * p.k + k, n * p.groups + g);
      }
    }
  });
}

}  // namespace fastinfer::cpu::FI_ISA
