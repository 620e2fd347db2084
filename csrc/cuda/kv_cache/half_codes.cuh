// Sixteen (or eight) 16-bit elements -> as many codes of an 8-bit cache: what a lane of the fast
// path of reshape_and_cache does. The same codes as store_codes() of cache_write.cuh, with fewer
// instructions: at full bandwidth an fp8 element leaves time for about ten. Magnitudes are compared
// in pairs, and the signs of four codes are put in at once.
#pragma once

#include <type_traits>

#include "cache_write.cuh"

namespace fastinfer::cuda {

template <int kWords>
struct alignas(16) HalfWords {
  uint32_t word[kWords];  // two elements each
};
using HalfRow = HalfWords<8>;

// top_bits() of the row: largest magnitude, as the bits of an fp32 number; NaN stays NaN.
template <class T, int kWords>
__device__ __forceinline__ uint32_t top_bits(const HalfWords<kWords>& row) {
  using Pair = typename PairOf<T>::Type;
  Pair top = __habs2(reinterpret_cast<const Pair&>(row.word[0]));
#pragma unroll
  for (int w = 1; w < kWords; ++w)
    top = __hmax2_nan(top, __habs2(reinterpret_cast<const Pair&>(row.word[w])));
  return max(__float_as_uint(to_float(top.x)) & 0x7FFFFFFFu,
             __float_as_uint(to_float(top.y)) & 0x7FFFFFFFu);
}

template <class T>
__device__ __forceinline__ float2 two_floats(uint32_t word) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u)};
  } else {
    return __half22float2(reinterpret_cast<const __half2&>(word));
  }
}

template <class T>
__device__ __forceinline__ uint32_t four_quotient_codes(uint32_t a, uint32_t b,
                                                        const Quotient& divide, bool fp8) {
  const float2 x = two_floats<T>(a), y = two_floats<T>(b);
  return four_codes({divide.unsigned_zero(x.x), divide.unsigned_zero(x.y),
                     divide.unsigned_zero(y.x), divide.unsigned_zero(y.y)},
                    fp8);
}

// Codes of the elements, four to a word. top: top_bits of at least this row (of the whole
// head will do).
template <class T, int kWords>
__device__ __forceinline__ void half_codes(uint32_t (&out)[kWords / 2],
                                           const HalfWords<kWords>& row, const Quotient& divide,
                                           uint32_t top, bool fp8, bool soft) {
  if (word_codes(true, fp8, soft) && __uint_as_float(top) < divide.limit) {
    if (fp8) {
#pragma unroll
      for (int w = 0; w < kWords / 2; ++w) {
        const uint32_t a = row.word[2 * w], b = row.word[2 * w + 1];
        const uint32_t code = four_quotient_codes<T>(a, b, divide, true);
        // The quotient of -0 came out as +0: e4m3 takes its signs from the elements.
        out[w] = code ^ ((code ^ __byte_perm(a, b, 0x7531)) & 0x80808080u);
      }
    } else {
#pragma unroll
      for (int w = 0; w < kWords / 2; ++w)
        out[w] = four_quotient_codes<T>(row.word[2 * w], row.word[2 * w + 1], divide, false);
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
    reinterpret_cast<uint8_t*>(code)[j] = code_of(x, __fdiv_rn(x, divide.scale), fp8, soft);
  }
#pragma unroll
  for (int w = 0; w < kWords / 2; ++w) out[w] = code[w];
}

}  // namespace fastinfer::cuda
