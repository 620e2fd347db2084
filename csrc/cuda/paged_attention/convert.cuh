// 8-bit codes to fp16 pairs, exactly: both products of an 8-bit cache run in fp16, whose mantissa
// holds every code; scales come in elsewhere.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastinfer::cuda {

// Bytes (0, 1) of `x` as the fp16 pair `low`, bytes (2, 3) as `high`.
struct HalfPairs {
  uint32_t low, high;
};

__device__ __forceinline__ uint32_t sub_half2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// int8: with its sign flipped a code u is 0 .. 255, 0x6400 | u is the fp16 number 1024 + u, and
// 1024 + 128 is subtracted.
__device__ __forceinline__ HalfPairs halves_from_int8(uint32_t x) {
  x ^= 0x80808080u;
  return {sub_half2(__byte_perm(x, 0x64646464u, 0x4140), 0x64806480u),
          sub_half2(__byte_perm(x, 0x64646464u, 0x4342), 0x64806480u)};
}

__device__ __forceinline__ uint32_t soft_halves_from_e4m3(uint32_t spread) {
  // `spread`: the codes in the upper bytes of the halves. Exponent and mantissa moved into place
  // give a value that is 2^8 too small.
  uint32_t r = (spread & 0x80008000u) | ((spread >> 1) & 0x3F803F80u);
  asm("mul.f16x2 %0, %0, %1;" : "+r"(r) : "r"(0x5C005C00u));
  const uint32_t rest = spread & 0x7F007F00u;
  if ((rest & 0x7F00u) == 0x7F00u) r |= 0x7FFFu;
  if ((rest & 0x7F000000u) == 0x7F000000u) r |= 0x7FFF0000u;
  return r;
}

template <bool kSoft>
__device__ __forceinline__ HalfPairs halves_from_e4m3(uint32_t x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  if constexpr (!kSoft) {
    HalfPairs r;
    asm("{\n"
        ".reg .b16 a, b;\n"
        "mov.b32 {a, b}, %2;\n"
        "cvt.rn.f16x2.e4m3x2 %0, a;\n"
        "cvt.rn.f16x2.e4m3x2 %1, b;\n"
        "}\n"
        : "=r"(r.low), "=r"(r.high)
        : "r"(x));
    return r;
  }
#endif
  return {soft_halves_from_e4m3(__byte_perm(x, 0, 0x1404)),
          soft_halves_from_e4m3(__byte_perm(x, 0, 0x3424))};
}

template <bool kE4m3, bool kSoft>
__device__ __forceinline__ HalfPairs halves_from_codes(uint32_t x) {
  if constexpr (kE4m3) {
    return halves_from_e4m3<kSoft>(x);
  } else {
    return halves_from_int8(x);
  }
}

}  // namespace fastinfer::cuda
