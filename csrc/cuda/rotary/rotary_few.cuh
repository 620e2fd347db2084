// One token or a few with a cache, in rotary_dense.cu's form: the time of such a launch is that of
// a chain (position, row of the table, rotation, largest magnitude, scale, codes) and of fetching
// its instructions. A lane holds two pairs of a head, so that a head of 128 is a warp and its
// maximum one instruction; the place in the cache is found while the table is on its way; what is
// rare is behind a call.
#pragma once

#include "rotary_dense.cuh"

namespace fastinfer::cuda {

constexpr int kFewThreads = 64, kFewPerSm = 1024;  // threads of a block, at most of all per SM

// What the usual path has no room for: every instruction of it is fetched at every launch.
struct FewCodes {
  uint32_t code;
  float scale;
};
template <class E>
static __device__ __noinline__ FewCodes few_codes_any(uint32_t first, uint32_t second, uint32_t top,
                                                      float scale, bool dynamic, bool fp8,
                                                      bool soft) {
  if (dynamic) scale = dynamic_scale(top, fp8);
  uint32_t code[1];
  half_codes<E>(code, HalfWords<2>{{first, second}}, scale, top, fp8, soft);
  return {code[0], scale};
}

template <class E>
__global__ void __launch_bounds__(kFewThreads)
    rotary_few_kernel(const __grid_constant__ DenseRotaryCache a) {
  const uint32_t lanes = 1u << a.lane_bits, lane = threadIdx.x & (lanes - 1);
  uint32_t head = (blockIdx.y * kFewThreads + threadIdx.x) >> a.lane_bits;
  const int64_t t = blockIdx.x;
  const uint32_t dim = 4 * lanes;
  const uint32_t at_first = a.interleaved ? 4 * lane : 2 * lane;
  const uint32_t at_second = at_first + (a.interleaved ? 2 : 2 * lanes);
  grid_launch_dependents();
  grid_wait();
  int64_t position = t;
  if (a.positions) position = index_of(a.positions, a.wide_positions, t * a.position_stride);
  const int64_t slot = index_of(a.slots, a.wide_slots, t * a.slot_stride);
  E* row = static_cast<E*>(const_cast<void*>(a.q)) + t * a.q_token;
  float* scale_at = nullptr;
  char* cache = nullptr;
  bool rotates = true;
  if (head >= a.q_heads) {
    head -= a.q_heads;
    row = static_cast<E*>(const_cast<void*>(a.k)) + t * a.k_token;
    cache = a.key_cache, scale_at = a.k_scale;
    if (head >= a.k_heads) {
      head -= a.k_heads, rotates = false;
      row = static_cast<E*>(const_cast<void*>(a.v)) + t * a.v_token;
      cache = a.value_cache, scale_at = a.v_scale;
    }
  }
  const bool live = head < (cache ? a.k_heads : a.q_heads);
  uint32_t* first_at = reinterpret_cast<uint32_t*>(row + head * dim + at_first);
  uint32_t* second_at = reinterpret_cast<uint32_t*>(row + head * dim + at_second);
  uint32_t first = 0, second = 0;
  if (live) first = *first_at, second = *second_at;
  scale_at += head * a.scale_head;
  float scale = 1.0f;
  if (a.codes && !a.dynamic && live && cache) scale = *scale_at;
  if (live && rotates) {
    const int64_t at = position * a.table_stride + 2 * lane;
    float2 c, s;
    if (a.table_is_float) {
      c = *reinterpret_cast<const float2*>(static_cast<const float*>(a.cos) + at);
      s = *reinterpret_cast<const float2*>(static_cast<const float*>(a.sin) + at);
    } else {
      c = two_floats<E>(*reinterpret_cast<const uint32_t*>(static_cast<const E*>(a.cos) + at));
      s = two_floats<E>(*reinterpret_cast<const uint32_t*>(static_cast<const E*>(a.sin) + at));
    }
    const float2 u = two_floats<E>(first), v = two_floats<E>(second);
    float x[2] = {u.x, u.y}, y[2] = {v.x, v.y};
    rotate(x, y, {c.x, c.y}, {s.x, s.y}, a.interleaved);
    const uint4 pack = pack_of<E>({x[0], x[1], y[0], y[1], 0.0f, 0.0f, 0.0f, 0.0f});
    *first_at = first = pack.x;
    *second_at = second = pack.y;
  }
  uint32_t top = 0;
  if (a.codes) {
    top = top_bits<E>(HalfWords<2>{{first, second}});
    if (lanes == 32) {
      top = __reduce_max_sync(kAllLanes, top);
    } else {
#pragma unroll 1
      for (uint32_t other = lanes / 2; other > 0; other /= 2)
        top = max(top, __shfl_xor_sync(kAllLanes, top, other));
    }
  }
  if (slot < 0 || !live || !cache) return;
  const Slot where = split_slot(slot, a.block_size, a.block_shift);
  const int64_t at = where.block * a.block_stride +
                     where.position * static_cast<int64_t>(a.cache_position) + head * dim;
  if (!a.codes) {
    E* to = reinterpret_cast<E*>(cache) + at;
    *reinterpret_cast<uint32_t*>(to + at_first) = first;
    *reinterpret_cast<uint32_t*>(to + at_second) = second;
    return;
  }
  const bool usual = (!a.dynamic || in_middle(top)) && word_codes(true, a.fp8, a.soft);
  if (a.dynamic && usual) {  // dynamic_scale()
    const float d = a.fp8 ? 448.0f : 127.0f, r = a.fp8 ? 1.0f / 448.0f : 1.0f / 127.0f;
    const float x = __uint_as_float(top), q = __fmul_rn(x, r);
    scale = __fmaf_rn(__fmaf_rn(-q, d, x), r, q);
  }
  const HalfQuotient divide(scale);
  uint32_t code;
  if (usual && divide.quick && top <= 0x7F800000u) {
    code = four_half_codes<E>(first, second, divide, a.fp8);
  } else {
    const FewCodes any = few_codes_any<E>(first, second, top, scale, a.dynamic, a.fp8, a.soft);
    code = any.code, scale = any.scale;
  }
  *reinterpret_cast<uint16_t*>(cache + at + at_first) = static_cast<uint16_t>(code);
  *reinterpret_cast<uint16_t*>(cache + at + at_second) = static_cast<uint16_t>(code >> 16);
  if (a.dynamic && lane == 0) scale_at[slot * a.scale_slot] = scale;
}

}  // namespace fastinfer::cuda
