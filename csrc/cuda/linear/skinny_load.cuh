// What the kernel of skinny.cuh is put together from: shared-memory reads, scales, staging of x.
#pragma once

#include <type_traits>

#include "../common/launch.cuh"
#include "../common/vec.cuh"
#include "../ptx/async_copy.cuh"
#include "load_shared.cuh"
#include "skinny_dequant.cuh"
#include "skinny_params.h"

namespace fastinfer::cuda {

// 16-byte pieces per lane and block of 64 columns of kStrips strips of 16 rows.
template <int kBits, int kStrips>
constexpr int kSkinnyPieces = kStrips * kBits / 4;

// Keeps a value in its register: the compiler would rather compute it again in the loop.
template <class T>
__device__ __forceinline__ void keep(T& x) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a register or two");
  if constexpr (sizeof(T) == 4) {
    asm volatile("" : "+r"(x));
  } else {
    asm volatile("" : "+l"(x));
  }
}

template <bool kBf16>
__device__ __forceinline__ void mma_1688(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  if constexpr (kBf16) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
  }
}

__device__ __forceinline__ uint2 load_shared_8(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ uint32_t load_shared_4(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ uint32_t load_shared_2(uint32_t address) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address) : "memory");
  return v;
}

// Scales or zeros of a strip: rows g8 and g8 + 8, 16 or 32 bits each.
__device__ __forceinline__ uint2 load_two(uint32_t address, bool wide) {
  return wide ? load_shared_8(address) : make_uint2(load_shared_4(address), 0);
}
__device__ __forceinline__ float2 two_floats(const uint2& raw, DType type) {
  if (type == DType::f32) return make_float2(__uint_as_float(raw.x), __uint_as_float(raw.y));
  if (type == DType::bf16)
    return make_float2(__uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xFFFF0000u));
  return __half22float2(*reinterpret_cast<const __half2*>(&raw.x));
}

// X of this rank's columns to shared memory, [m][x_pitch], zero beyond K: one group of cp.async, or
// where that is not possible element by element.
template <int kThreads, class E>
__device__ __forceinline__ void stage_x(const SkinnyParams& p, E* to, int first_column,
                                        int columns) {
  // Tokens are the outer loop, which all threads walk alike. (One index over tokens and packs, with
  // a token counted up where a row ends, was wrong: ptxas 13.0 kept the token in a uniform register
  // although lanes of a warp pass the end of a row in different iterations.)
  const E* row = static_cast<const E*>(p.x);
#pragma unroll 1
  for (int token = 0; token < p.m; ++token, row += p.x_stride, to += p.x_pitch) {
#pragma unroll 1
    for (int c = threadIdx.x * 8; c < columns; c += kThreads * 8) {
      const int column = first_column + c;
      if (p.x_packs) {
        const int left = max(0, min(p.k - column, 8));
        cp_async_zero(shared_address(to + c), row + (left > 0 ? column : 0), 2 * left);
        continue;
      }
      uint32_t word[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t e[2] = {};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int k = column + 2 * j + h;
          if (k < p.k) e[h] = reinterpret_cast<const uint16_t*>(row)[p.perm ? p.perm[k] : k];
        }
        word[j] = e[0] | e[1] << 16;
      }
      *reinterpret_cast<uint4*>(to + c) = make_uint4(word[0], word[1], word[2], word[3]);
    }
  }
}

}  // namespace fastinfer::cuda
