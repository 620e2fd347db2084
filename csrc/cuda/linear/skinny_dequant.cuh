// Codes of one 16 x 16 tile (linear_layout.h) to the A registers of mma.m16n8k16, exactly: q - z as
// bf16 or fp16, without a conversion instruction.
//
// The bits of a code are put into the mantissa of a power of two, whose unit then is 1, and that
// power is subtracted together with z:
//   bf16, 4 bit: 0x4300 | q = 128 + q                     fp16, 4 bit: 0x6400 | q = 1024 + q, and
//   fp16, 8 bit: 0x6400 | u = 1024 + u                      0x6400 | q << 4 = 1024 + 16 q
//   bf16, 8 bit: the mantissa holds 7 bits: int8_bf16.cuh.
// Registers: a0, a2 belong to row g8, a1, a3 to row g8 + 8.
#pragma once

#include "../common/bits.cuh"
#include "../common/dtype.cuh"
#include "int8_bf16.cuh"

namespace fastinfer::cuda {

template <bool kBf16>
__device__ __forceinline__ uint32_t sub_half2(uint32_t a, uint32_t b) {
  if constexpr (kBf16) {
    const __nv_bfloat162 d = __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&a),
                                     *reinterpret_cast<const __nv_bfloat162*>(&b));
    return *reinterpret_cast<const uint32_t*>(&d);
  } else {
    const __half2 d =
        __hsub2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
    return *reinterpret_cast<const uint32_t*>(&d);
  }
}

__device__ __forceinline__ uint32_t fma_half2(uint32_t a, uint32_t b, uint32_t c) {
  const __half2 d =
      __hfma2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b),
              *reinterpret_cast<const __half2*>(&c));
  return *reinterpret_cast<const uint32_t*>(&d);
}

// What is subtracted from a register of row g8 (0) or g8 + 8 (1).
template <bool kBf16>
struct Int4Zero {
  uint32_t low[2], high[2];  // high: fp16 codes in bits 4 to 7, scaled by 1 / 16

  __device__ __forceinline__ void set(int half, uint32_t z) {
    low[half] = ((kBf16 ? 0x4300u : 0x6400u) | z) * 0x00010001u;
    high[half] = (0xD400u | z << 4) * 0x00010001u;  // -(64 + z)
  }
};

template <bool kBf16>
__device__ __forceinline__ void dequantize_int4(uint32_t (&a)[4], uint32_t w,
                                                const Int4Zero<kBf16>& zero) {
  if constexpr (kBf16) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[i] = sub_half2<true>(and_or(w >> (4 * i), 0x000F000Fu, 0x43004300u), zero.low[i & 1]);
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t v = w >> (8 * i);
      a[2 * i] = sub_half2<false>(and_or(v, 0x000F000Fu, 0x64006400u), zero.low[0]);
      a[2 * i + 1] = fma_half2(and_or(v, 0x00F000F0u, 0x64006400u), 0x2C002C00u, zero.high[1]);
    }
  }
}

template <bool kBf16>
__device__ __forceinline__ void dequantize_int8(uint32_t (&a)[4], uint32_t w01, uint32_t w23) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t w = i < 2 ? w01 : w23;
    if constexpr (kBf16)
      a[i] = int8_to_bf16x2(w, i & 1);
    else
      a[i] = sub_half2<false>(and_or(w >> (8 * (i & 1)), 0x00FF00FFu, 0x64006400u), 0x64806480u);
  }
}

}  // namespace fastinfer::cuda
