// Codes in registers to the A operand of wgmma, exactly: (q - z) fits a 16-bit float for 4- and
// 8-bit codes. A register pair holds two neighbouring k of one row. A code is or-ed into the
// mantissa of a power of two and the power + z subtracted, which rounds nothing.
#pragma once

#include "../common/bits.cuh"
#include "../common/dtype.cuh"
#include "../ptx/mma.cuh"
#include "int8_bf16.cuh"

namespace fastinfer::cuda::wide {

template <class T>
__device__ __forceinline__ uint32_t subtract2(uint32_t a, uint32_t b) {
  uint32_t r;
  if constexpr (std::is_same_v<T, __half>)
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  else
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

template <class T>
__device__ __forceinline__ uint32_t multiply2(uint32_t a, uint32_t b) {
  uint32_t r;
  if constexpr (std::is_same_v<T, __half>)
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  else
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

template <class T, int kBits>
struct Codes {
  static constexpr bool kHalf = std::is_same_v<T, __half>;
  static constexpr bool kWide = !kHalf && kBits == 8;  // 8 bits exceed a bf16 mantissa
  static constexpr uint32_t kBase = kHalf ? 0x64006400u : 0x43004300u;
  static constexpr uint32_t kFloatBase = 0x4B000000u;

  // What is subtracted for a zero point: by pair(), or by floats().
  static __device__ __forceinline__ uint32_t offset(uint32_t zero, bool floats) {
    if constexpr (kWide) {
      if (floats) return kFloatBase | zero;
      return __float_as_uint(static_cast<float>(static_cast<int>(zero) - 128)) / 65536 *
             0x00010001u;
    } else {
      return kBase | zero | zero << 16;
    }
  }
  // Register j (row +8 when odd, k +8 when j >= 2) of the k step whose words are `w`.
  static __device__ __forceinline__ uint32_t pair(const uint32_t* w, int j, uint32_t offset) {
    if constexpr (kBits == 4) {
      return subtract2<T>(and_or(w[0] >> 4 * j, 0x000F000Fu, kBase), offset);
    } else if constexpr (kHalf) {
      return subtract2<T>(__byte_perm(w[j / 2], 0x64646464u, j % 2 ? 0x4341 : 0x4240), offset);
    } else {
      return subtract2<T>(int8_to_bf16x2(w[j / 2], j % 2), offset);
    }
  }
  // The same as two floats.
  static __device__ __forceinline__ void floats(const uint32_t* w, int j, uint32_t offset,
                                                float& low, float& high) {
    if constexpr (kWide) {
      const float minus = __uint_as_float(offset);
      low = __uint_as_float(__byte_perm(w[j / 2], kFloatBase, j % 2 ? 0x7441 : 0x7440)) - minus;
      high = __uint_as_float(__byte_perm(w[j / 2], kFloatBase, j % 2 ? 0x7443 : 0x7442)) - minus;
    } else {
      const uint32_t both = pair(w, j, offset);
      if constexpr (kHalf) {
        const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&both));
        low = f.x, high = f.y;
      } else {
        low = __uint_as_float(both << 16);
        high = __uint_as_float(both & 0xFFFF0000u);
      }
    }
  }
};

}  // namespace fastinfer::cuda::wide
