// The two functions a draw depends on, with every rounding spelled out: each + * / below is one
// IEEE fp32 operation, never fused, so that every instruction-set level and CUDA get the same bits
// and choose the same token. F is float or a float vector, U its unsigned counterpart; the
// including file is compiled without contraction (see sampling_row.h), device code uses the _rn
// intrinsics.
//
//   weight(x)         e^x for x <= 0: 0 below -87, relative error about 2e-7, weight(0) = 1
//   exponential(bits) -log(1 - u), u = (bits + 1/2) / 2^32: an Exp(1) variate, 1.2e-10 .. 22.9,
//   never 0
//
// -log(1 - u) and not -log(u): an exponential race is decided by small values, and next to u = 0
// they have the full resolution of the 32 random bits.
#pragma once

#include <string.h>

#include "philox.h"

namespace fastinfer {

#if defined(__CUDA_ARCH__)
FI_PORTABLE float rn_add(float a, float b) { return __fadd_rn(a, b); }
FI_PORTABLE float rn_sub(float a, float b) { return __fsub_rn(a, b); }
FI_PORTABLE float rn_mul(float a, float b) { return __fmul_rn(a, b); }
FI_PORTABLE float rn_div(float a, float b) { return __fdiv_rn(a, b); }
#else
template <class A, class B>
FI_PORTABLE auto rn_add(A a, B b) {
  return a + b;
}
template <class A, class B>
FI_PORTABLE auto rn_sub(A a, B b) {
  return a - b;
}
template <class A, class B>
FI_PORTABLE auto rn_mul(A a, B b) {
  return a * b;
}
template <class A, class B>
FI_PORTABLE auto rn_div(A a, B b) {
  return a / b;
}
#endif

template <class To, class From>
FI_PORTABLE To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "same_bits keeps the size");
  To y;
  memcpy(&y, &x, sizeof(To));
  return y;
}

// Adding 1.5 * 2^23 rounds to an integer (nearest even) and leaves it in the low mantissa bits.
constexpr float kRound = 12582912.0f;
constexpr uint32_t kRoundBits = 0x4B400000u;

template <class F, class U>
FI_PORTABLE F weight(F x) {
  const F shifted = rn_add(rn_mul(x, 1.44269504f), kRound);
  const F n = rn_sub(shifted, kRound);
  // ln 2 in two parts; the first has so few bits that n times it is exact.
  const F r = rn_sub(rn_sub(x, rn_mul(n, 0.693359375f)), rn_mul(n, -2.12194440e-4f));
  F p = rn_add(rn_mul(r, 1.0f / 720.0f), 1.0f / 120.0f);
  p = rn_add(rn_mul(p, r), 1.0f / 24.0f);
  p = rn_add(rn_mul(p, r), 1.0f / 6.0f);
  p = rn_add(rn_mul(p, r), 0.5f);
  p = rn_add(rn_mul(p, r), 1.0f);
  p = rn_add(rn_mul(p, r), 1.0f);
  const F scale = same_bits<F>((same_bits<U>(shifted) << 23) + 0x3F800000u);  // 2^n
  return x >= -87.0f ? rn_mul(p, scale) : F{};
}

FI_PORTABLE float to_float(uint32_t bits) { return static_cast<float>(bits); }

// fbits = float(bits), flipped = float(~bits), both rounded to nearest.
template <class F, class U>
FI_PORTABLE F exponential(F fbits, F flipped) {
  const F u = rn_mul(rn_add(fbits, 0.5f), 0x1p-32f);
  const F v = rn_mul(rn_add(flipped, 0.5f), 0x1p-32f);  // 1 - u
  // v = 2^k m, m in [sqrt(1/2), sqrt(2)). k64 = k + 64 keeps everything unsigned.
  const U vbits = same_bits<U>(v);
  const U k64 = (vbits + (0x20000000u - 0x3F3504F3u)) >> 23;
  const F m = same_bits<F>(vbits - (k64 << 23) + 0x20000000u);
  const F k = rn_sub(same_bits<F>(k64 + kRoundBits), kRound + 64.0f);
  const F f = u < 0.25f ? -u : rn_sub(m, 1.0f);
  // log(1 + f) = 2 atanh(s), s = f / (2 + f), |s| < 0.172: five terms reach fp32.
  const F s = rn_div(f, rn_add(f, 2.0f));
  const F s2 = rn_mul(s, s);
  F p = rn_add(rn_mul(s2, 1.0f / 9.0f), 1.0f / 7.0f);
  p = rn_add(rn_mul(p, s2), 1.0f / 5.0f);
  p = rn_add(rn_mul(p, s2), 1.0f / 3.0f);
  p = rn_add(rn_mul(p, s2), 1.0f);
  return -rn_add(rn_mul(k, 0.693147181f), rn_mul(rn_mul(s, 2.0f), p));
}

// Mass of a weight in units of 2^-40: integers add up to the same sum in any order.
FI_PORTABLE uint64_t mass_of(float w) {
  return static_cast<uint64_t>(static_cast<int64_t>(w * 0x1p40f));
}

// Order-preserving map of floats (no NaN, no -0) to unsigned integers, and back.
FI_PORTABLE uint32_t order_key(float x) {
  const uint32_t u = same_bits<uint32_t>(x);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
FI_PORTABLE float from_order_key(uint32_t key) {
  return same_bits<float>(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}
constexpr uint32_t kKeyLowest = 0x007FFFFFu;   // -inf
constexpr uint32_t kKeyHighest = 0xFF800000u;  // +inf

}  // namespace fastinfer
