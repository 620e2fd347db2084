// w8a8_linear: int8 x int8 products summed exactly in int32, then
//
//   y = float(sum_k (x - x_zero) w) * x_scale[m] * weight_scale[n] + bias[n]
//
// in fp32, multiplied in that order, rounded once. Integer sums are exact in any order and the
// epilogue is plain IEEE arithmetic, so every ISA level gives the same bits.
// One step of a vector accumulator takes kStep bytes of x and w: vpdpbusd with u8 = x + 128 (the
// sum of the weights, times 128, is taken off at the end), or widening to 16 bits and pmaddwd. The
// caller bounds K so that no true sum leaves int32; intermediate wrap-around is harmless.
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "linear_epilogue.h"

namespace fastinfer::cpu::FI_ISA {
namespace {

#if defined(__AVX512VNNI__)
typedef __m512i Bytes;  // as loaded
constexpr int64_t kStep = 64;
constexpr int kOffset = 128;
FI_INLINE Bytes load_w(const int8_t* p) { return _mm512_loadu_si512(p); }
FI_INLINE Bytes load_x(const int8_t* p) {
  return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128));
}
FI_INLINE vi dot(vi acc, Bytes x, Bytes w) { return (vi)_mm512_dpbusd_epi32((__m512i)acc, x, w); }
FI_INLINE vi add_weights(vi acc, Bytes w) {
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi8(1), w);
}
#else
constexpr int kOffset = 0;
#if defined(__AVX512F__)
typedef __m512i Bytes;  // widened to 16 bits
FI_INLINE Bytes load_w(const int8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
}
FI_INLINE vi dot(vi acc, Bytes x, Bytes w) { return acc + (vi)_mm512_madd_epi16(x, w); }
FI_INLINE Bytes ones() { return _mm512_set1_epi16(1); }
#elif defined(__AVX2__)
typedef __m256i Bytes;
FI_INLINE Bytes load_w(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
}
FI_INLINE vi dot(vi acc, Bytes x, Bytes w) { return acc + (vi)_mm256_madd_epi16(x, w); }
FI_INLINE Bytes ones() { return _mm256_set1_epi16(1); }
#elif defined(__SSE2__)
typedef __m128i Bytes;
FI_INLINE Bytes load_w(const int8_t* p) {
  const __m128i v = _mm_loadl_epi64((const __m128i*)p);
  return _mm_srai_epi16(_mm_unpacklo_epi8(v, v), 8);
}
FI_INLINE vi dot(vi acc, Bytes x, Bytes w) { return acc + (vi)_mm_madd_epi16(x, w); }
FI_INLINE Bytes ones() { return _mm_set1_epi16(1); }
#else
typedef int16_t Bytes __attribute__((vector_size(kLanes * 4)));
FI_INLINE Bytes load_w(const int8_t* p) {
  Bytes b;
  for (int i = 0; i < 2 * kLanes; ++i) b[i] = p[i];
  return b;
}
FI_INLINE vi dot(vi acc, Bytes x, Bytes w) {
  for (int i = 0; i < 2 * kLanes; ++i) acc[i / 2] += x[i] * w[i];
  return acc;
}
FI_INLINE Bytes ones() { return Bytes{} + 1; }
#endif
constexpr int64_t kStep = 2 * kLanes;
FI_INLINE Bytes load_x(const int8_t* p) { return load_w(p); }
FI_INLINE vi add_weights(vi acc, Bytes w) { return dot(acc, ones(), w); }
#endif

FI_INLINE uint32_t total(vi v) {
  typedef uint32_t vu4 __attribute__((vector_size(16)));
#if defined(__AVX512F__)
  typedef uint32_t vu8 __attribute__((vector_size(32)));
  const vu8 eight = low_half<vu8>(v) + high_half<vu8>(v);
  const vu4 four = low_half<vu4>(eight) + high_half<vu4>(eight);
#elif defined(__AVX2__)
  const vu4 four = low_half<vu4>(v) + high_half<vu4>(v);
#else
  const vu4 four = (vu4)v;
#endif
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// Sums of T tokens x R channels into dots [T][kDenseBlock] and, when asked, the sums of the
// weights. Short tiles repeat their last row.
template <int T, int R>
FI_INLINE void int8_tile(const int8_t* const* x, const int8_t* const* w, int64_t k, bool need_sum,
                         uint32_t* dots, uint32_t* sums) {
  const int64_t full = k / kStep * kStep;
  vi acc[T][R] = {}, weights[R] = {};
  for (int64_t i = 0; i < full; i += kStep) {
    Bytes xs[T];
    for (int t = 0; t < T; ++t) xs[t] = load_x(x[t] + i);
    for (int r = 0; r < R; ++r) {
      const Bytes ws = load_w(w[r] + i);
      if (need_sum) weights[r] = add_weights(weights[r], ws);
      for (int t = 0; t < T; ++t) acc[t][r] = dot(acc[t][r], xs[t], ws);
    }
  }
  for (int r = 0; r < R; ++r) {
    // With an offset the vector part holds (x + 128) w; the scalar tail is x w.
    const uint32_t vector_sum = need_sum ? total(weights[r]) : 0;
    sums[r] = vector_sum;
    for (int64_t i = full; i < k; ++i) sums[r] += static_cast<uint32_t>(int32_t{w[r][i]});
    for (int t = 0; t < T; ++t) {
      uint32_t d = total(acc[t][r]) - kOffset * vector_sum;
      for (int64_t i = full; i < k; ++i)
        d += static_cast<uint32_t>(int32_t{x[t][i]} * int32_t{w[r][i]});
      dots[t * kDenseBlock + r] = d;
    }
  }
}

template <int T, int R>
void int8_block(const Int8Params& p, int64_t m0, int64_t n0) {
  using F32 = Elem<DType::f32>;
  const int64_t channels = least(kDenseBlock, p.n - n0), tokens = least(T, p.m - m0);
  const bool need_sum = kOffset != 0 || (p.x_zeros && !p.weight_sum);
  alignas(64) uint32_t dots[T * kDenseBlock], sums[kDenseBlock];
  const int8_t *x[T], *w[R];
  for (int t = 0; t < T; ++t) x[t] = p.x + least(m0 + t, p.m - 1) * p.x_stride;
  for (int64_t n = 0; n < kDenseBlock; n += R) {
    for (int r = 0; r < R; ++r)
      w[r] = p.weight + (n0 + least(n + r, channels - 1)) * p.weight_stride;
    int8_tile<T, R>(x, w, p.k, need_sum, dots + n, sums + n);
  }
  if (p.weight_sum)
    for (int64_t n = 0; n < channels; ++n) sums[n] = static_cast<uint32_t>(p.weight_sum[n0 + n]);
  for (int64_t t = 0; t < tokens; ++t) {
    const uint32_t zero = p.x_zeros ? static_cast<uint32_t>(p.x_zeros[m0 + t]) : 0;
    for (int64_t n = 0; n < channels; n += kLanes) {
      const vu d = load_raw<vu>(dots + t * kDenseBlock + n) - load_raw<vu>(sums + n) * zero;
      const vf scale = load_some<F32>(p.weight_scale, n0 + n, channels - n);
      const vf y = __builtin_convertvector((vi)d, vf) * p.x_scale[m0 + t] * scale;
      store_lanes(p.out, m0 + t, n0 + n, channels - n, y);
    }
  }
}

}  // namespace

void linear_int8(const Int8Params& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b)
    for (int64_t m = 0; m < p.m; m += 4) {
      if (p.m - m == 1)
        int8_block<1, 4>(p, m, b * kDenseBlock);
      else
        int8_block<4, kLanes >= 16 ? 4 : 2>(p, m, b * kDenseBlock);
    }
}

}  // namespace fastinfer::cpu::FI_ISA
