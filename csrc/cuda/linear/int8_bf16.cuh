// Bytes of 8-bit codes to bf16, exactly and without a shift: the integer pipe, which has half the
// rate of the floating one, is what the linears with 8-bit weights are short of.
#pragma once

#include <cstdint>

namespace fastinfer::cuda {

// u - 128 of bytes j and j + 2 (j = 0, 1) of w. Under the byte 0x43 a byte u reads 128 + u, or 2 u
// from 128 on, where its top bit is the lowest of the exponent. t = v / 2 - 128 then is what is
// wanted, but half of it below zero: t - relu(-t). No step rounds: 8 bits are enough for all.
__device__ __forceinline__ uint32_t int8_to_bf16x2(uint32_t w, int j) {
  const uint32_t v = __byte_perm(w, 0x43434343u, j == 0 ? 0x4240 : 0x4341);
  uint32_t t, r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(t) : "r"(v), "r"(0x3F003F00u), "r"(0xC300C300u));
  asm("fma.rn.relu.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(v), "r"(0xBF00BF00u), "r"(0x43004300u));
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(r), "r"(0xBF80BF80u), "r"(t));
  return r;
}

}  // namespace fastinfer::cuda
