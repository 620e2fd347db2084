// One head of one token into the paged cache, from registers: what reshape_and_cache and the kernel
// that also rotates share.
//
//   float cache   rounded to the cache's type
//   8-bit cache   code = round_to_nearest_even(x / scale), saturating at 127 (int8) or 448 (e4m3)
//   dynamic       scale = absmax / 127 or absmax / 448 of the head, 1 where that is 0, NaN where
//   the
//                 head holds inf or NaN; one lane of the head stores it
//
// A head of D elements belongs to `lanes` neighbouring lanes of a warp (a power of two, aligned);
// lane l holds the 16-byte pack at element l * kSize (8 elements of a 16-bit type, 4 of fp32) as
// fp32 values that the token type can represent, 0 past D. Heads of more than 32 packs take
// several rounds: head_scale() over all packs first, then store_head_pack() for each.
//
// The same bits as the CPU kernel: every quotient is the IEEE one (see Quotient).
#pragma once

#include "../../cpu/kv_cache.h"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"

namespace fastinfer::cuda {

// Where K or V goes. All strides in elements.
struct CacheStore {
  char* cache;
  int64_t block_stride, position_stride, head_stride;
  cpu::ScaleView scale;  // data == nullptr: a float cache
  int64_t dim;
  DType dtype;
  bool packs;  // whole packs are aligned and none is cut by the end of a head
  bool soft;   // e4m3 by integer arithmetic
};

// Host side. `pack` elements are written at a time (16 bytes of the token type).
inline CacheStore cache_store(const cpu::CacheSide& side, const cpu::CacheWriteParams& p, int pack,
                              bool soft) {
  const int64_t size = dtype_size(p.cache_dtype), bytes = pack * size;
  bool packs = reinterpret_cast<uintptr_t>(side.cache) % bytes == 0 && p.dim % pack == 0;
  for (const int64_t s : {side.block_stride, side.position_stride, side.head_stride})
    packs = packs && s * size % bytes == 0;
  return {static_cast<char*>(side.cache),
          side.block_stride,
          side.position_stride,
          side.head_stride,
          side.scale,
          p.dim,
          p.cache_dtype,
          packs,
          soft};
}

// Lanes that share a head of `packs` packs.
inline int lanes_of_head(int64_t packs) {
  int lanes = 1;
  while (lanes < 32 && lanes < packs) lanes *= 2;
  return lanes;
}

struct Slot {
  int64_t block, position;
};

// slot >= 0. A 64-bit division is a subroutine of a hundred instructions: only where it is needed.
__device__ __forceinline__ Slot split_slot(int64_t slot, int64_t block_size) {
  if ((block_size & (block_size - 1)) == 0) {
    const int shift = __ffsll(block_size) - 1;
    return {slot >> shift, slot & (block_size - 1)};
  }
  if (((slot | block_size) >> 32) == 0) {
    const uint32_t n = static_cast<uint32_t>(slot), d = static_cast<uint32_t>(block_size);
    return {n / d, n % d};
  }
  return {slot / block_size, slot % block_size};
}
// The same where most blocks are of a power of two: 1 << block_shift, or -1 for other sizes. The
// division stands apart, so that it costs the others no registers.
static __device__ __noinline__ Slot divide_slot(int64_t slot, int32_t block_size) {
  return split_slot(slot, block_size);
}
__device__ __forceinline__ Slot split_slot(int64_t slot, int32_t block_size, int block_shift) {
  if (block_shift < 0) return divide_slot(slot, block_size);
  return {slot >> block_shift, slot & (block_size - 1)};
}

// Largest |x| as bits, which order as the magnitudes do; inf and NaN come out as 0x7F800000 and
// above.
template <int N>
__device__ __forceinline__ uint32_t top_bits(const float (&x)[N]) {
  uint32_t top = 0;
#pragma unroll
  for (int j = 0; j < N; ++j) top = max(top, __float_as_uint(x[j]) & 0x7FFFFFFFu);
  return top;
}

// Magnitudes from 2^-47 to 2^49, given as bits: no step of a division under- or overflows.
__device__ __forceinline__ bool in_middle(uint32_t magnitude) {
  return magnitude - 0x28000000u < 0x30000000u;
}

// Over `lanes` neighbours; every lane of the warp takes part.
__device__ __forceinline__ uint32_t group_max(uint32_t x, int lanes) {
#pragma unroll
  for (int lane = 16; lane > 0; lane >>= 1)
    if (lane < lanes) x = max(x, __shfl_xor_sync(kAllLanes, x, lane));
  return x;
}

static __device__ __noinline__ float rare_dynamic_scale(uint32_t top, float divisor) {
  if (top >= 0x7F800000u) return __uint_as_float(0x7FC00000u);
  const float s = __fdiv_rn(__uint_as_float(top), divisor);
  return s == 0.0f ? 1.0f : s;
}

// top / 448 or top / 127. In the middle of the range by the rounded reciprocal and a correction,
// which give the IEEE quotient for these divisors (every mantissa was tried).
__device__ __forceinline__ float dynamic_scale(uint32_t top, bool fp8) {
  const float d = fp8 ? 448.0f : 127.0f, r = fp8 ? 1.0f / 448.0f : 1.0f / 127.0f;
  if (!in_middle(top)) return rare_dynamic_scale(top, d);
  const float x = __uint_as_float(top), q = __fmul_rn(x, r);
  return __fmaf_rn(__fmaf_rn(-q, d, x), r, q);
}

// x / scale, correctly rounded, for many x: with 1 / scale = r + e (r rounded, e its error), q =
// x * r + x * e is one of the two neighbours of the quotient, and q + (x - q * scale) * r then
// rounds to the right one (Markstein 1990), because the remainder is exact. That holds in the
// middle of the range only: a scale outside [2^-60, 2^60] and a pack with |x / scale| >= 1024, inf
// or NaN take the division of the hardware library. Quotients too small for an exact remainder code
// to 0 either way. Four instructions instead of about twelve: a written fp8 element costs 3 bytes,
// time for about ten instructions at full bandwidth.
struct Quotient {
  float scale, r, e, limit;

  __device__ __forceinline__ explicit Quotient(float s) : scale(s), r(0), e(0), limit(-1.0f) {
    if (s >= 0x1p-60f && s <= 0x1p60f) {
      // What __frcp_rn does in this range, without its check and the branch behind it.
      asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(s));
      r = __fmaf_rn(r, __fmaf_rn(-s, r, 1.0f), r);
      e = __fmul_rn(__fmaf_rn(-s, r, 1.0f), r);
      limit = 1024.0f * s;
    }
  }
  template <int N>
  __device__ __forceinline__ bool quick(const float (&x)[N]) const {
    return __uint_as_float(top_bits(x)) < limit;  // false where x holds NaN
  }
  __device__ __forceinline__ float operator()(float x) const {
    const float q = __fmaf_rn(x, r, __fmul_rn(x, e));
    return copysignf(__fmaf_rn(__fmaf_rn(-q, scale, x), r, q), x);  // -0 stays -0
  }
};

// Code of x / scale = q. A NaN keeps the sign of x, as on the CPU.
__device__ __forceinline__ uint8_t code_of(float x, float q, bool fp8, bool soft) {
  if (!fp8) return static_cast<uint8_t>(to_int8(q));
  if (q != q) return x != x && __float_as_int(x) < 0 ? 0xFF : 0x7F;
  return to_e4m3(q, soft);
}

// Four quotients, finite and below 1024, as four codes.
__device__ __forceinline__ uint32_t four_codes(const float (&q)[4], bool fp8) {
  if (fp8) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    const uint32_t low = __nv_cvt_float2_to_fp8x2({q[0], q[1]}, __NV_SATFINITE, __NV_E4M3);
    const uint32_t high = __nv_cvt_float2_to_fp8x2({q[2], q[3]}, __NV_SATFINITE, __NV_E4M3);
    return low | high << 16;
#else
    return soft_e4m3(q[0]) | soft_e4m3(q[1]) << 8 | soft_e4m3(q[2]) << 16 |
           static_cast<uint32_t>(soft_e4m3(q[3])) << 24;
#endif
  }
  uint32_t word[4];
#pragma unroll
  for (int j = 0; j < 4; ++j)  // 1.5 * 2^23: the fp32 adder rounds, the low byte is the code
    word[j] = __float_as_uint(__fadd_rn(fminf(fmaxf(q[j], -127.0f), 127.0f), 12582912.0f));
  return __byte_perm(__byte_perm(word[0], word[1], 0x40), __byte_perm(word[2], word[3], 0x40),
                     0x5410);
}

// May codes be stored in whole words by the instructions of this GPU?
__device__ __forceinline__ bool word_codes(bool packs, bool fp8, bool soft) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  return packs && !(fp8 && soft);
#else
  return packs;
#endif
}

// Elements [i, i + N) of a row of n codes. The fast way is straight code; everything else (edges,
// NaN, FASTINFER_FORCE_ARCH=80) shares one compact loop: inlined four times, its code did not fit
// the instruction cache.
template <int N>
__device__ __forceinline__ void store_codes(char* row, int64_t i, int64_t n, bool packs,
                                            const float (&x)[N], const Quotient& divide, bool fp8,
                                            bool soft) {
  static_assert(N == 4 || N == 8, "codes are stored four or eight at a time");
  if (word_codes(packs, fp8, soft) && divide.quick(x)) {
    uint32_t word[N / 4];
#pragma unroll
    for (int w = 0; w < N / 4; ++w)
      word[w] = four_codes(
          {divide(x[4 * w]), divide(x[4 * w + 1]), divide(x[4 * w + 2]), divide(x[4 * w + 3])},
          fp8);
    if constexpr (N == 8) {
      *reinterpret_cast<uint2*>(row + i) = make_uint2(word[0], word[1]);
    } else {
      *reinterpret_cast<uint32_t*>(row + i) = word[0];
    }
    return;
  }
  float y[N];  // indexed by a loop: in local memory, here only
#pragma unroll
  for (int j = 0; j < N; ++j) y[j] = x[j];
#pragma unroll 1
  for (int j = 0; j < N && i + j < n; ++j)
    row[i + j] = static_cast<char>(code_of(y[j], __fdiv_rn(y[j], divide.scale), fp8, soft));
}

// The values of a pack. A NaN keeps its sign, which the conversion from fp16 drops.
template <class T>
__device__ __forceinline__ void as_floats(const uint4& pack, float (&x)[Pack<T>::kSize]) {
  unpack<T>(x, pack);
  if constexpr (std::is_same_v<T, __half>) {
    const uint32_t word[4] = {pack.x, pack.y, pack.z, pack.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      x[2 * w] = copysignf(x[2 * w], word[w] & 0x8000u ? -1.0f : 1.0f);
      x[2 * w + 1] = copysignf(x[2 * w + 1], word[w] >> 31 ? -1.0f : 1.0f);
    }
  }
}

// First element of the head that a slot holds.
__device__ __forceinline__ char* cache_row(const CacheStore& c, Slot slot, int64_t head) {
  const int64_t size = c.scale.data ? 1 : dtype_size(c.dtype);
  return c.cache +
         (slot.block * c.block_stride + slot.position * c.position_stride + head * c.head_stride) *
             size;
}

// Scale of the head; a dynamic one is computed from `top` (group_max of top_bits over the whole
// head) and stored by the lane that passes `owner`.
__device__ __forceinline__ float head_scale(const CacheStore& c, Slot slot, int64_t head,
                                            uint32_t top, bool owner) {
  if (!c.scale.data) return 1.0f;
  float* p = c.scale.data + slot.block * c.scale.block + slot.position * c.scale.position +
             head * c.scale.head;
  if (!c.scale.dynamic) return *p;
  const float s = dynamic_scale(top, c.dtype == DType::f8e4m3);
  if (owner) *p = s;
  return s;
}

template <class T>
__device__ __forceinline__ void store_head_pack(const CacheStore& c, Slot slot, int64_t head,
                                                int64_t i, const float (&x)[Pack<T>::kSize],
                                                float scale) {
  char* row = cache_row(c, slot, head);
  if (c.scale.data) {
    store_codes(row, i, c.dim, c.packs, x, Quotient(scale), c.dtype == DType::f8e4m3, c.soft);
    return;
  }
  store_pack(reinterpret_cast<T*>(row), i, c.dim, c.packs, pack_of<T>(x));
}

}  // namespace fastinfer::cuda
