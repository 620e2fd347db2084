// Bit operations that the compiler does not fuse on its own.
#pragma once

#include <cstdint>

namespace fastinfer::cuda {

// (x & mask) | bits in one instruction.
__device__ __forceinline__ uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(x), "r"(mask), "r"(bits));
  return r;
}

}  // namespace fastinfer::cuda
