// int8 quantisation of one row, for every kernel that ends in an int8 activation
// (quantize_per_token, rms_norm_quant, silu_and_mul_quant): one definition, the same bits
// everywhere.
//
//   symmetric (zero == nullptr):  s = absmax / 127,            q = clamp(rne(y / s), -127, 127)
//   asymmetric:                   s = max / 255 - min / 255,   z = clamp(rne(-128 - min / s))
//                                 with min <= 0 <= max,        q = clamp(rne(y / s) + z, -128, 127)
//   and y ~ (q - z) * s. A row whose s is 0 gets s = 1, z = 0, q = 0. A row that holds inf or NaN
//   gets s = NaN, z = 0, q = 0: its outputs are NaN, those of other rows are untouched.
//
// All divisions and roundings are IEEE fp32: bits do not depend on the ISA level, nor on any other
// row. Every function sits in an anonymous namespace: see isa.h.
#pragma once

#include "simd.h"

namespace fastinfer::cpu {
namespace {

FI_INLINE void store_codes(int8_t* q, int64_t n, vf v) {
  const vsb codes = __builtin_convertvector(__builtin_convertvector(v, vi), vsb);
  if (n >= kLanes) {
    store_raw(q, codes);
  } else {
    for (int64_t j = 0; j < n; ++j) q[j] = codes[j];
  }
}

// q = clamp(rne(y / s) + z, low, high) with a given scale; a NaN element gives z.
template <class E>
FI_INLINE void quantize_row_with(const void* y, int64_t n, float s, float z, float low, int8_t* q) {
  const vf vlow = splat(low - z), vhigh = splat(127.0f - z), vs = splat(s), vz = splat(z);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i;
    const vf v = left >= kLanes ? E::load(y, i) : load_partial<E>(y, i, left);
    vf t = v / vs;
    t = t == t ? t : vf{};
    store_codes(q + i, left, vround(vmin(vmax(t, vlow), vhigh)) + vz);
  }
}

template <class E>
FI_INLINE void quantize_row_as(const void* y, int64_t n, int8_t* q, float* scale, int32_t* zero) {
  vf low{}, high{}, poison{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const vf v = n - i >= kLanes ? E::load(y, i) : load_partial<E>(y, i, n - i);
    low = vmin(low, v);
    high = vmax(high, v);
    poison += v - v;  // 0, or NaN from the first inf or NaN on
  }
  const float top = max(high), bottom = -max(-low), bad = sum(poison);
  float s = zero ? top / 255.0f - bottom / 255.0f : (top > -bottom ? top : -bottom) / 127.0f;
  float z = 0.0f;
  if (bad != bad || s == 0.0f) {
    s = s == 0.0f && bad == bad ? 1.0f : __builtin_nanf("");
    for (int64_t i = 0; i < n; ++i) q[i] = 0;
  } else {
    if (zero) {
      z = __builtin_nearbyintf(-128.0f - bottom / s);
      z = z < -128.0f ? -128.0f : z > 127.0f ? 127.0f : z;
    }
    quantize_row_with<E>(y, n, s, z, zero ? -128.0f : -127.0f, q);
  }
  *scale = s;
  if (zero) *zero = static_cast<int32_t>(z);
}

// The form for a row that was just computed in fp32; zero may be nullptr (symmetric).
FI_INLINE void quantize_row(const float* y, int64_t n, int8_t* q, float* scale, int32_t* zero) {
  quantize_row_as<Elem<DType::f32>>(y, n, q, scale, zero);
}

}  // namespace
}  // namespace fastinfer::cpu
