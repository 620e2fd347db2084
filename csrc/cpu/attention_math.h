// Building blocks of the attention core: 2^x, reductions over lanes, the 64-key transposition, and
// the register-blocked product C[MR rows, NV vectors] (+)= A[MR, k] * B[k, NV vectors].
//
// Every element of C is one chain of fused multiply-adds over k in increasing order, whatever MR
// and NV: how rows are grouped never shows in the bits.
#pragma once

#include "attention.h"
#include "simd.h"

namespace fastinfer::cpu {
namespace {

constexpr float kLog2e = 1.44269504088896f;
constexpr float kLn2 = 0.693147180559945f;
constexpr float kInf = __builtin_inff();

// 2^x for x <= 0 (relative error 2e-7); exactly 1 at 0; 0 below -126 and at -inf; NaN stays NaN.
FI_INLINE vf exp2_neg(vf x) {
  const vf low = splat(-126.0f);
  const vf c = x < low ? low : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: the sum's low bits hold round(c)
  const vf shifted = c + magic;
  const vf r = c - (shifted - magic);
  vf p = splat(1.326472614891827e-3f);
  p = p * r + 9.671512991189957e-3f;
  p = p * r + 5.550733581185341e-2f;
  p = p * r + 2.4022242426872253e-1f;
  p = p * r + 6.931470036506653e-1f;
  p = p * r + 1.0f;
  const vf y = (vf)((vi)p + ((vi)shifted << 23));
  return x < low ? vf{} : y;
}

// ---- lanes ----
typedef float v4f __attribute__((vector_size(16)));
typedef float v8f __attribute__((vector_size(32)));

// Tree reduction: halves, then pairs. Only the order matters, and it is fixed.
template <class F>
FI_INLINE float reduce(vf v, F f) {
#if defined(__AVX512F__)
  const v8f h = f(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                  __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
#elif defined(__AVX2__)
  const v8f h = v;
#endif
#if defined(__AVX2__)
  const v4f q =
      f(__builtin_shufflevector(h, h, 0, 1, 2, 3), __builtin_shufflevector(h, h, 4, 5, 6, 7));
#else
  const v4f q = v;
#endif
  const v4f d = f(q, __builtin_shufflevector(q, q, 2, 3, 0, 1));
  return f(d, __builtin_shufflevector(d, d, 1, 0, 3, 2))[0];
}
FI_INLINE float reduce_sum(vf v) {
  return reduce(v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}
FI_INLINE float reduce_max(vf v) {
  return reduce(v, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}

// Lane block b (4 lanes) = four 32-bit words at p + 4 b stride (bytes): every fourth row.
FI_INLINE vf load_column_block(const char* p, int64_t stride) {
#if defined(__AVX2__)
  // Intrinsics: an insertion from memory spares the shuffle unit, which limits the transposition.
  const __m256 ab = _mm256_insertf128_ps(_mm256_castps128_ps256((__m128)load_raw<v4f>(p)),
                                         (__m128)load_raw<v4f>(p + 4 * stride), 1);
#endif
#if defined(__AVX512F__)
  const __m256 cd =
      _mm256_insertf128_ps(_mm256_castps128_ps256((__m128)load_raw<v4f>(p + 8 * stride)),
                           (__m128)load_raw<v4f>(p + 12 * stride), 1);
  return (vf)_mm512_insertf32x8(_mm512_castps256_ps512(ab), cd, 1);
#elif defined(__AVX2__)
  return (vf)ab;
#else
  return load_raw<vf>(p);
#endif
}

// 4 x 4 transposition inside every block of four lanes.
FI_INLINE void transpose_blocks(vf& a, vf& b, vf& c, vf& d) {
#if defined(__AVX512F__)
#define FI_EACH_BLOCK(x, y, z, w) \
  x, y, z, w, x + 4, y + 4, z + 4, w + 4, x + 8, y + 8, z + 8, w + 8, x + 12, y + 12, z + 12, w + 12
#elif defined(__AVX2__)
#define FI_EACH_BLOCK(x, y, z, w) x, y, z, w, x + 4, y + 4, z + 4, w + 4
#else
#define FI_EACH_BLOCK(x, y, z, w) x, y, z, w
#endif
  constexpr int n = kLanes;
  const vf ab_low = __builtin_shufflevector(a, b, FI_EACH_BLOCK(0, n, 1, n + 1));
  const vf ab_high = __builtin_shufflevector(a, b, FI_EACH_BLOCK(2, n + 2, 3, n + 3));
  const vf cd_low = __builtin_shufflevector(c, d, FI_EACH_BLOCK(0, n, 1, n + 1));
  const vf cd_high = __builtin_shufflevector(c, d, FI_EACH_BLOCK(2, n + 2, 3, n + 3));
  a = __builtin_shufflevector(ab_low, cd_low, FI_EACH_BLOCK(0, 1, n, n + 1));
  b = __builtin_shufflevector(ab_low, cd_low, FI_EACH_BLOCK(2, 3, n + 2, n + 3));
  c = __builtin_shufflevector(ab_high, cd_high, FI_EACH_BLOCK(0, 1, n, n + 1));
  d = __builtin_shufflevector(ab_high, cd_high, FI_EACH_BLOCK(2, 3, n + 2, n + 3));
#undef FI_EACH_BLOCK
}

// Element i of every 32-bit word, as fp32: one element per word, or two, or four.
template <class E>
struct Words;
template <>
struct Words<Elem<DType::f32>> {
  FI_INLINE vf get(vf w, int) { return w; }
};
template <>
struct Words<Elem<DType::f16>> {
  FI_INLINE vf get(vf w, int i) {
    return half_to_float(narrow_to_16(i ? (vu)w >> 16 : (vu)w & 0xffffu));
  }
};
template <>
struct Words<Elem<DType::bf16>> {
  FI_INLINE vf get(vf w, int i) { return (vf)(i ? (vu)w & 0xffff0000u : (vu)w << 16); }
};
template <>
struct Words<Elem<DType::f8e4m3>> {
  FI_INLINE vf get(vf w, int i) { return fp8_to_float(((vu)w >> (8 * i)) & 0xffu); }
};
template <>
struct Words<Elem<DType::i8>> {
  FI_INLINE vf get(vf w, int i) {
    return __builtin_convertvector((vi)((vu)w << (24 - 8 * i)) >> 24, vf);
  }
};

// out[dim][kTile] = rows[kTile][dim]^T in fp32, row r times scale[r] if there are scales. Rows are
// `stride` bytes apart and hold a multiple of 16 bytes. Transposing words, not elements, is half
// the work for 16-bit and a quarter for 8-bit types.
template <class E>
void transpose_tile(const char* rows, int64_t stride, int64_t bytes, const float* scale,
                    float* out) {
  constexpr int count = 4 / E::size;
  for (int key = 0; key < kTile; key += kLanes) {
    const vf factor = scale ? load_raw<vf>(scale + key) : vf{};
    float* o = out + key;
    for (int64_t i = 0; i < bytes; i += 16) {
      const char* p = rows + key * stride + i;
      vf w[4] = {load_column_block(p, stride), load_column_block(p + stride, stride),
                 load_column_block(p + 2 * stride, stride),
                 load_column_block(p + 3 * stride, stride)};
      transpose_blocks(w[0], w[1], w[2], w[3]);
      for (int n = 0; n < 4; ++n)
        for (int e = 0; e < count; ++e, o += kTile) {
          const vf x = Words<E>::get(w[n], e);
          store_raw(o, scale ? x * factor : x);
        }
    }
  }
}

// ---- product ----
constexpr int kBlockRows = 6;
#if defined(__AVX512F__)
constexpr int kBlockVectors = 4;  // 24 accumulators of 32 registers
#else
constexpr int kBlockVectors = 2;  // 12 of 16
#endif

// c[r][0 .. NV) = (keep ? c * keep[r] : 0) + sum over k in [begin, end) of a[r][k] * b[k]; b holds
// elements of E, b_stride apart.
template <int MR, int NV, class E>
void product(const float* a, int64_t a_stride, const char* b, int64_t b_stride, int64_t begin,
             int64_t end, float* c, int64_t c_stride, const float* keep) {
  vf acc[MR][NV];
  for (int r = 0; r < MR; ++r)
    for (int v = 0; v < NV; ++v)
      acc[r][v] = keep ? load_raw<vf>(c + r * c_stride + v * kLanes) * keep[r] : vf{};
  for (int64_t k = begin; k < end; ++k) {
    vf column[NV];
    for (int v = 0; v < NV; ++v) column[v] = E::load(b + k * b_stride * E::size, v * kLanes);
    for (int r = 0; r < MR; ++r) {
      const float x = a[r * a_stride + k];
      for (int v = 0; v < NV; ++v) acc[r][v] += x * column[v];
    }
  }
  for (int r = 0; r < MR; ++r)
    for (int v = 0; v < NV; ++v) store_raw(c + r * c_stride + v * kLanes, acc[r][v]);
}

// The same for a run-time number of rows, at most MAX (<= kBlockRows).
template <int NV, class E, int MAX = kBlockRows>
FI_INLINE void product_rows(int rows, const float* a, int64_t a_stride, const void* b,
                            int64_t b_stride, int64_t begin, int64_t end, float* c,
                            int64_t c_stride, const float* keep) {
#define FI_CASE(n)                                                                             \
  case n:                                                                                      \
    if constexpr (n <= MAX)                                                                    \
      product<n, NV, E>(a, a_stride, (const char*)b, b_stride, begin, end, c, c_stride, keep); \
    return;
  switch (rows) { FI_CASE(1) FI_CASE(2) FI_CASE(3) FI_CASE(4) FI_CASE(5) FI_CASE(6) }
#undef FI_CASE
}

}  // namespace
}  // namespace fastinfer::cpu
