// Float vectors of the instruction-set level a file is compiled for: kLanes lanes of fp32, loads
// and stores for every element type, and the few functions the kernels need. Built on GCC/Clang
// vector extensions, so that +, *, comparisons and `mask ? a : b` work as written.
//
// Everything is in an anonymous namespace on purpose: see isa.h. Only builtins and intrinsics are
// used, nothing from std::.
#pragma once

#include <cstdint>

#include "dtype.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastinfer::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));
typedef uint8_t vb __attribute__((vector_size(kLanes)));
typedef int8_t vsb __attribute__((vector_size(kLanes)));

#define FI_INLINE static inline __attribute__((always_inline))

template <class V>
FI_INLINE V load_raw(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
FI_INLINE void store_raw(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}
FI_INLINE float bits_to_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
FI_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

FI_INLINE vf splat(float x) { return x - vf{}; }  // -0 stays -0: x - 0
FI_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
FI_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
FI_INLINE vf vabs(vf a) { return (vf)((vu)a & 0x7fffffffu); }

// Sums and maxima over the lanes in one fixed tree order: lane i with lane i + n/2, n halving.
typedef float vf8 __attribute__((vector_size(32)));
typedef float vf4 __attribute__((vector_size(16)));
template <class Half, class V>
FI_INLINE Half low_half(V v) {
  Half h;
  __builtin_memcpy(&h, &v, sizeof(Half));
  return h;
}
template <class Half, class V>
FI_INLINE Half high_half(V v) {
  Half h;
  __builtin_memcpy(&h, reinterpret_cast<const char*>(&v) + sizeof(Half), sizeof(Half));
  return h;
}
FI_INLINE float sum(vf v) {
#if defined(__AVX512F__)
  const vf8 eight = low_half<vf8>(v) + high_half<vf8>(v);
  const vf4 four = low_half<vf4>(eight) + high_half<vf4>(eight);
#elif defined(__AVX2__)
  const vf4 four = low_half<vf4>(v) + high_half<vf4>(v);
#else
  const vf4 four = v;
#endif
  return (four[0] + four[2]) + (four[1] + four[3]);
}
FI_INLINE float max(vf v) {
#if defined(__AVX512F__)
  const vf8 l8 = low_half<vf8>(v), h8 = high_half<vf8>(v), eight = l8 > h8 ? l8 : h8;
  const vf4 l4 = low_half<vf4>(eight), h4 = high_half<vf4>(eight), four = l4 > h4 ? l4 : h4;
#elif defined(__AVX2__)
  const vf4 l4 = low_half<vf4>(v), h4 = high_half<vf4>(v), four = l4 > h4 ? l4 : h4;
#else
  const vf4 four = v;
#endif
  const float a = four[0] > four[2] ? four[0] : four[2];
  const float b = four[1] > four[3] ? four[1] : four[3];
  return a > b ? a : b;
}

// ---- lane widths ----
// GCC takes these conversions apart, down to single lanes for bytes; the intrinsics it does not.
#if defined(__AVX2__) && !defined(__AVX512F__)
template <class V>
FI_INLINE __m128i low_half(V x) {  // 8 bytes
  long long bits;
  __builtin_memcpy(&bits, &x, 8);
  return _mm_cvtsi64_si128(bits);
}
#endif
FI_INLINE vu widen(vh x) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, vu);
#endif
}
FI_INLINE vu widen(vb x) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu8_epi32((__m128i)x);
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepu8_epi32(low_half(x));
#else
  return __builtin_convertvector(x, vu);
#endif
}
FI_INLINE vi widen(vsb x) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepi8_epi32((__m128i)x);
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepi8_epi32(low_half(x));
#else
  return __builtin_convertvector(x, vi);
#endif
}
FI_INLINE vh narrow_to_16(vu x) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__AVX2__)
  const __m256i even = _mm256_and_si256((__m256i)x, _mm256_set1_epi32(0xffff));
  const __m256i packed = _mm256_packus_epi32(even, even);  // per 128-bit half
  return (vh)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(x, vh);
#endif
}
FI_INLINE vb narrow_to_8(vu x) {
#if defined(__AVX512F__)
  return (vb)_mm512_cvtepi32_epi8((__m512i)x);
#else
  return __builtin_convertvector(x, vb);
#endif
}

// ---- element types
// -------------------------------------------------------------------------------------------------
FI_INLINE vf half_to_float(vh h) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps((__m128i)h);
#else
  // Exponent re-bias by a multiplication, which also normalises subnormals; infinities and NaN get
  // their exponent back by hand.
  const vu x = __builtin_convertvector(h, vu);
  const vu magnitude = (x & 0x7fffu) << 13;
  const vf scaled = (vf)magnitude * bits_to_float(0x77800000u);  // 2^112
  const vu special = (vu)((vi)magnitude >= (vi)(vu{} + 0x0f800000u));
  return (vf)((((vu)scaled & ~special) | ((magnitude | 0x7f800000u) & special)) |
              ((x & 0x8000u) << 16));
#endif
}

FI_INLINE uint16_t float_to_half_scalar(float f) {
#if defined(__AVX2__)
  return (uint16_t)_cvtss_sh(f, 0);
#else
  const uint32_t u = float_to_bits(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
  if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  // rounds to infinity from 65520 on
  if (a < 0x38800000u) {                                    // subnormal: let the fp32 adder round
    const float r = bits_to_float(a) + bits_to_float(0x3f000000u);
    return (uint16_t)(sign | (float_to_bits(r) - 0x3f000000u));
  }
  return (uint16_t)(sign | ((a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u) >> 13));
#endif
}

FI_INLINE vh float_to_half(vf v) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (vh)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  vh out;
  for (int i = 0; i < kLanes; ++i) out[i] = float_to_half_scalar(v[i]);
  return out;
#endif
}

FI_INLINE vf bfloat_to_float(vh h) { return (vf)(widen(h) << 16); }

FI_INLINE vh float_to_bfloat(vf v) {
  const vu u = (vu)v;
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vu nan = (vu)(v != v);
  return narrow_to_16((rounded & ~nan) | (((u >> 16) | 0x40u) & nan));
}

// e4m3fn: 4 exponent bits (bias 7), 3 mantissa bits, no infinity, 0x7f = NaN. As an fp16 pattern it
// is the value / 256.
FI_INLINE vf fp8_to_float(vu x) {
  const vf value = half_to_float(narrow_to_16(((x & 0x80u) << 8) | ((x & 0x7fu) << 7))) * 256.0f;
  const vu nan = (vu)((x & 0x7fu) == 0x7fu);
  return (vf)((vu)value | (nan & 0x7fc00000u));
}
FI_INLINE vf fp8_to_float(vb b) { return fp8_to_float(widen(b)); }

// Round to nearest even, saturating at 448; NaN stays NaN.
FI_INLINE uint8_t float_to_fp8_scalar(float f) {
  const uint32_t u = float_to_bits(f), sign = (u >> 24) & 0x80u;
  uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return (uint8_t)(sign | 0x7fu);
  if (a >= 0x43e00000u) return (uint8_t)(sign | 0x7eu);  // >= 448
  if (a < 0x3c800000u) {  // below 2^-6: subnormal, spacing 2^-9; the fp32 adder rounds
    const float r =
        bits_to_float(a) + bits_to_float(0x46800000u);  // + 2^14, whose last bit is 2^-9
    return (uint8_t)(sign | (float_to_bits(r) - 0x46800000u));
  }
  a += 0x7ffffu + ((a >> 20) & 1u);
  return (uint8_t)(sign | ((a - 0x3c000000u) >> 20));
}

FI_INLINE vb float_to_fp8(vf v) {
  const vu u = (vu)v, a = u & 0x7fffffffu;
  const vu normal = (a + 0x7ffffu + ((a >> 20) & 1u) - 0x3c000000u) >> 20;
  const vu tiny = (vu)((vf)a + bits_to_float(0x46800000u)) - 0x46800000u;
  vu code = (vi)a < (vi)(vu{} + 0x3c800000u) ? tiny : normal;
  code = (vi)a >= (vi)(vu{} + 0x43e00000u) ? vu{} + 0x7eu : code;
  code = (vi)a > (vi)(vu{} + 0x7f800000u) ? vu{} + 0x7fu : code;
  return narrow_to_8(code | ((u >> 24) & 0x80u));
}

template <DType T>
struct Elem;

template <>
struct Elem<DType::f32> {
  static constexpr int64_t size = 4;
  FI_INLINE vf load(const void* p, int64_t i) { return load_raw<vf>((const float*)p + i); }
  FI_INLINE void store(void* p, int64_t i, vf v) { store_raw((float*)p + i, v); }
  FI_INLINE float get(const void* p, int64_t i) { return ((const float*)p)[i]; }
  FI_INLINE void set(void* p, int64_t i, float x) { ((float*)p)[i] = x; }
};
template <>
struct Elem<DType::f16> {
  static constexpr int64_t size = 2;
  FI_INLINE vf load(const void* p, int64_t i) {
    return half_to_float(load_raw<vh>((const uint16_t*)p + i));
  }
  FI_INLINE void store(void* p, int64_t i, vf v) { store_raw((uint16_t*)p + i, float_to_half(v)); }
  FI_INLINE float get(const void* p, int64_t i) {
    vh h{};
    h[0] = ((const uint16_t*)p)[i];
    return half_to_float(h)[0];
  }
  FI_INLINE void set(void* p, int64_t i, float x) { ((uint16_t*)p)[i] = float_to_half_scalar(x); }
};
template <>
struct Elem<DType::bf16> {
  static constexpr int64_t size = 2;
  FI_INLINE vf load(const void* p, int64_t i) {
    return bfloat_to_float(load_raw<vh>((const uint16_t*)p + i));
  }
  FI_INLINE void store(void* p, int64_t i, vf v) {
    store_raw((uint16_t*)p + i, float_to_bfloat(v));
  }
  FI_INLINE float get(const void* p, int64_t i) {
    return bits_to_float((uint32_t)((const uint16_t*)p)[i] << 16);
  }
  FI_INLINE void set(void* p, int64_t i, float x) {
    ((uint16_t*)p)[i] = float_to_bfloat(splat(x))[0];
  }
};
template <>
struct Elem<DType::f8e4m3> {
  static constexpr int64_t size = 1;
  FI_INLINE vf load(const void* p, int64_t i) {
    return fp8_to_float(load_raw<vb>((const uint8_t*)p + i));
  }
  FI_INLINE void store(void* p, int64_t i, vf v) { store_raw((uint8_t*)p + i, float_to_fp8(v)); }
  FI_INLINE float get(const void* p, int64_t i) {
    vb b{};
    b[0] = ((const uint8_t*)p)[i];
    return fp8_to_float(b)[0];
  }
  FI_INLINE void set(void* p, int64_t i, float x) { ((uint8_t*)p)[i] = float_to_fp8_scalar(x); }
};
template <>
struct Elem<DType::i8> {
  static constexpr int64_t size = 1;
  FI_INLINE vf load(const void* p, int64_t i) {
    return __builtin_convertvector(widen(load_raw<vsb>((const int8_t*)p + i)), vf);
  }
  FI_INLINE float get(const void* p, int64_t i) { return (float)((const int8_t*)p)[i]; }
  // store and set: round to nearest even, saturating to the symmetric range; NaN gives 0.
  FI_INLINE void store(void* p, int64_t i, vf v) {
    const vf clamped = vmin(vmax(v == v ? v : vf{}, splat(-127.0f)), splat(127.0f));
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: the fp32 adder rounds
    const vi code = (vi)(clamped + magic) - (vi)magic;
    store_raw((int8_t*)p + i, narrow_to_8((vu)code));
  }
  FI_INLINE void set(void* p, int64_t i, float x) {
    const float r = __builtin_nearbyintf(x);
    ((int8_t*)p)[i] = (int8_t)(r > 127.0f     ? 127.0f
                               : r >= -127.0f ? r
                               : r < -127.0f  ? -127.0f
                                              : 0.0f);
  }
};

// First n (< kLanes) elements; the other lanes are 0.
template <class E>
FI_INLINE vf load_partial(const void* p, int64_t i, int64_t n) {
  vf v{};
  for (int64_t j = 0; j < n; ++j) v[j] = E::get(p, i + j);
  return v;
}
template <class E>
FI_INLINE void store_partial(void* p, int64_t i, int64_t n, vf v) {
  for (int64_t j = 0; j < n; ++j) E::set(p, i + j, v[j]);
}

// f(Elem<T>{}) for a floating-point activation type. The caller has checked the dtype.
template <class F>
FI_INLINE void with_float(DType t, F&& f) {
  if (t == DType::f32)
    f(Elem<DType::f32>{});
  else if (t == DType::f16)
    f(Elem<DType::f16>{});
  else
    f(Elem<DType::bf16>{});
}

// ---- functions
// ------------------------------------------------------------------------------------------------------
FI_INLINE vf vround(vf x) {         // nearest even, |x| < 2^22
  const float magic = 12582912.0f;  // 1.5 * 2^23
  return (x + magic) - magic;
}

// e^x: reduction to [-ln2/2, ln2/2] and a degree-6 polynomial (relative error about 2e-7). Below
// -87.3, -inf included, the result is 0; above 88.7 it is inf.
FI_INLINE vf vexp(vf x) {
  const vf clamped = vmax(vmin(x, splat(88.8f)), splat(-87.5f));
  const vf n = vround(clamped * 1.44269504f);
  const vf r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  vf p = splat(1.0f / 720.0f);
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n in two steps so that n = 128 does not overflow the exponent field before the
  // multiplication.
  const vi half = __builtin_convertvector(n, vi) >> 1, rest = __builtin_convertvector(n, vi) - half;
  vf y = p * (vf)((half + 127) << 23) * (vf)((rest + 127) << 23);
  y = x < splat(-87.3f) ? vf{} : y;
  return x != x ? x : y;
}

// tanh x = 1 - 2 / (1 + e^2x); near 0 the odd series avoids cancellation.
FI_INLINE vf vtanh(vf x) {
  const vf a = vmin(vabs(x), splat(15.0f));
  const vf big = 1.0f - 2.0f / (1.0f + vexp(a + a));
  const vf a2 = a * a;
  const vf small =
      a * (1.0f + a2 * (-1.0f / 3.0f +
                        a2 * (2.0f / 15.0f + a2 * (-17.0f / 315.0f + a2 * (62.0f / 2835.0f)))));
  const vf y = a < splat(0.25f) ? small : big;
  return x != x ? x : (vf)((vu)y | ((vu)x & 0x80000000u));
}

FI_INLINE vf vsigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }

}  // namespace
}  // namespace fastinfer::cpu
