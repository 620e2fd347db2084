// What the mma.sync paths of w8a8_linear share: m16n8k32 on int8, and 16 bytes of a row loaded
// whatever its alignment.
//
// Fragments (lane = 4 g + t), four int8 per register: a0 (row g; k 4t..4t+3), a1 (row g + 8), a2,
// a3 k + 16. b0 (k 4t..; column g), b1 k + 16. c0, c1 (row g; columns 2t, 2t+1), c2, c3 row g + 8.
#pragma once

#include <cstdint>

namespace fastinfer::cuda {

__device__ __forceinline__ void mma_s8(int32_t (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                       uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Bytes [0, count), at most 16, of what lies at `from`; the rest is 0 and not read.
static __device__ __noinline__ uint4 load_bytes(const int8_t* from, int count) {
  uint32_t word[4] = {};
#pragma unroll
  for (int i = 0; i < 16; ++i)
    if (i < count)
      word[i / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(from[i])) << 8 * (i % 4);
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// Bytes [k, k + 16) of a row of `count` bytes; what lies past its end is 0 and not read. `aligned`:
// the row's address is a multiple of 16. kOnce: past L1, nobody reads it again.
template <bool kOnce>
__device__ __forceinline__ uint4 load_16(const int8_t* row, int k, int count, bool aligned) {
  uint4 v = make_uint4(0, 0, 0, 0);
  if (aligned && k + 16 <= count) {
    if constexpr (kOnce)
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "l"(row + k));
    else
      v = *reinterpret_cast<const uint4*>(row + k);
  } else if (k < count) {
    v = load_bytes(row + k, count - k);
  }
  return v;
}

// Host side: whether every row of a matrix at `data` can be loaded 16 bytes at a time.
inline bool rows_aligned(const void* data, int64_t rows, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (rows <= 1 || stride % 16 == 0);
}

}  // namespace fastinfer::cuda
