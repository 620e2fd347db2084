// Sixteen (or eight) 16-bit elements -> as many codes of an 8-bit cache: what a lane of the fast
// path of reshape_and_cache does. The same codes as store_codes() of cache_write.cuh, with fewer
// instructions: at full bandwidth an fp8 element leaves time for about ten.
#pragma once

#include <type_traits>

#include "cache_write.cuh"

namespace fastinfer::cuda {

template <int kWords>
struct alignas(16) HalfWords {
  uint32_t word[kWords];  // two elements each
};
using HalfRow = HalfWords<8>;

// top_bits() of the row: largest magnitude, as the bits of an fp32 number; NaN stays NaN. Maximum
// and minimum of three are one instruction, magnitudes first would be another per pair.
template <class T, int kWords>
__device__ __forceinline__ uint32_t top_bits(const HalfWords<kWords>& row) {
  using Pair = typename PairOf<T>::Type;
  Pair high = as_pair<T>(row.word[0]), low = high;
#pragma unroll
  for (int w = 1; w < kWords; ++w) {
    high = __hmax2_nan(high, as_pair<T>(row.word[w]));
    low = __hmin2_nan(low, as_pair<T>(row.word[w]));
  }
  const Pair top = __hmax2_nan(__habs2(high), __habs2(low));
  return max(__float_as_uint(to_float(top.x)) & 0x7FFFFFFFu,
             __float_as_uint(to_float(top.y)) & 0x7FFFFFFFu);
}

// All that a static scale asks of the row: NaN where it holds one, else something that is not.
template <class T, int kWords>
__device__ __forceinline__ uint32_t nan_bits(const HalfWords<kWords>& row) {
  using Pair = typename PairOf<T>::Type;
  Pair high = as_pair<T>(row.word[0]);
#pragma unroll
  for (int w = 1; w < kWords; ++w) high = __hmax2_nan(high, as_pair<T>(row.word[w]));
  return max(__float_as_uint(to_float(high.x)) & 0x7FFFFFFFu,
             __float_as_uint(to_float(high.y)) & 0x7FFFFFFFu);
}

template <class T>
__device__ __forceinline__ float2 two_floats(uint32_t word) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u)};
  } else {
    return __half22float2(reinterpret_cast<const __half2&>(word));
  }
}

// x / scale for a 16-bit x, near enough for its code. With r a little below 1 / scale and e the
// rest, x * r + x * e is rounded once, from a sum that is off by 2^-42 of it. It differs from the
// IEEE quotient only where x / scale lies that near to the middle h between two fp32 numbers, and
// the code only where one of these is halfway between two codes: h = m (1 +- 2^-24), m of b <= 8
// bits. With x of at most 11 bits, x = h * scale * (1 + tiny) in integers needs, for scale = j *
// 2^(25 - b) + d with a small d, m * d = +-j: impossible as j <= m, but for a scale with all bits
// set (m a power of two, d = -1), which is not quick. r and e are positive: -0 stays -0 and inf
// stays inf.
struct HalfQuotient {
  float scale, r, e;
  bool quick;

  HalfQuotient() = default;
  __device__ __forceinline__ explicit HalfQuotient(float s) : scale(s), r(0), e(0) {
    quick = s >= 0x1p-60f && s <= 0x1p60f && ((__float_as_uint(s) + 1) & 0x7FFFFFu) != 0;
    if (quick) {
      asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(s));  // within an ulp
      r = __uint_as_float(__float_as_uint(r) - 2);
      e = __fmul_rn(__fmaf_rn(-s, r, 1.0f), r);
    }
  }
  __device__ __forceinline__ float operator()(float x) const {
    return __fmaf_rn(x, r, __fmul_rn(x, e));
  }
};

template <class T>
__device__ __forceinline__ uint32_t four_half_codes(uint32_t a, uint32_t b,
                                                    const HalfQuotient& divide, bool fp8) {
  const float2 x = two_floats<T>(a), y = two_floats<T>(b);
  return four_codes({divide(x.x), divide(x.y), divide(y.x), divide(y.y)}, fp8);
}

// Codes of the elements, four to a word. top: top_bits or nan_bits of at least this row (of the
// whole head will do).
template <class T, int kWords>
__device__ __forceinline__ void half_codes(uint32_t (&out)[kWords / 2],
                                           const HalfWords<kWords>& row, float scale, uint32_t top,
                                           bool fp8, bool soft) {
  const HalfQuotient divide(scale);
  if (word_codes(true, fp8, soft) && divide.quick && top <= 0x7F800000u) {
    if (fp8) {
#pragma unroll
      for (int w = 0; w < kWords / 2; ++w)
        out[w] = four_half_codes<T>(row.word[2 * w], row.word[2 * w + 1], divide, true);
    } else {
#pragma unroll
      for (int w = 0; w < kWords / 2; ++w)
        out[w] = four_half_codes<T>(row.word[2 * w], row.word[2 * w + 1], divide, false);
    }
    return;
  }
  HalfWords<kWords> copy = row;  // indexed by a loop: in local memory, here only
  uint32_t code[kWords / 2];
#pragma unroll 1
  for (int j = 0; j < 2 * kWords; ++j) {
    const uint32_t bits = copy.word[j / 2] >> 16 * (j % 2) & 0xFFFFu;
    const float2 pair = two_floats<T>(bits);
    const float x = copysignf(pair.x, bits >> 15 ? -1.0f : 1.0f);
    reinterpret_cast<uint8_t*>(code)[j] = code_of(x, __fdiv_rn(x, scale), fp8, soft);
  }
#pragma unroll
  for (int w = 0; w < kWords / 2; ++w) out[w] = code[w];
}

}  // namespace fastinfer::cuda
