// What the kernels for the tensors that models have share (rotary_dense.cu for any number of
// tokens, rotary_few.cuh for few with a cache): parameters, a lane's part of a head, the cache
// write.
#pragma once

#include "../common/row_group.cuh"
#include "../kv_cache/half_codes.cuh"
#include "rotary.h"
#include "rotary_parts.cuh"

namespace fastinfer::cuda {

// Strides in elements.
struct DenseRotary {
  const void *cos, *sin, *positions, *q, *k;
  void *q_out, *k_out;
  int64_t q_token, k_token, q_out_token, k_out_token;
  int32_t tokens, groups, position_stride, table_stride;
  uint16_t q_heads, k_heads;
  uint8_t lane_bits;
  bool interleaved, table_is_float, wide_positions;

  static constexpr bool kCached = false;
  template <class E>
  __device__ __forceinline__ E* target(int which, int64_t t) const {
    return static_cast<E*>(which == 0 ? q_out : k_out) +
           t * (which == 0 ? q_out_token : k_out_token);
  }
};

// In place, v is read only; and both caches.
struct DenseRotaryCache {
  const void *cos, *sin, *positions, *q, *k, *v, *slots;
  char *key_cache, *value_cache;
  float *k_scale, *v_scale;
  int64_t q_token, k_token, v_token, block_stride;
  int32_t tokens, groups, position_stride, table_stride, slot_stride;
  int32_t block_size, cache_position, scale_slot, scale_head, ahead;
  uint16_t q_heads, k_heads;
  uint8_t lane_bits;
  int8_t block_shift;  // of a block size that is a power of two, else -1
  bool interleaved, table_is_float, wide_positions, wide_slots, codes, fp8, soft, dynamic;

  static constexpr bool kCached = true;
  template <class E>
  __device__ __forceinline__ E* target(int which, int64_t t) const {
    return static_cast<E*>(const_cast<void*>(which == 0 ? q : k)) +
           t * (which == 0 ? q_token : k_token);
  }
};
__device__ __forceinline__ int64_t index_of(const void* p, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(p)[i] : static_cast<const int32_t*>(p)[i];
}

// A lane's part of a head: twice 16 bytes, or (little work, and so less code) twice 8.
template <class E, class V>
struct Part {
  static constexpr int kSize = sizeof(V) / sizeof(E), kWords = sizeof(V) / 2;
  V first, second;

  __device__ __forceinline__ void rotate_by(const float (&c)[kSize], const float (&s)[kSize],
                                            bool interleaved) {
    if constexpr (kSize == 8) {
      rotate<E>(first, second, c, s, interleaved);
    } else {
      float x[kSize], y[kSize];
      unpack<E>(x, first);
      unpack<E>(y, second);
      rotate(x, y, c, s, interleaved);
      first = half_pack_of<E>(x);
      second = half_pack_of<E>(y);
    }
  }
  __device__ __forceinline__ HalfWords<kWords> words() const {
    HalfWords<kWords> row;
    reinterpret_cast<V*>(&row)[0] = first;
    reinterpret_cast<V*>(&row)[1] = second;
    return row;
  }
};

template <class E, int kSize>
__device__ __forceinline__ void load_table(float (&c)[kSize], const void* table, bool is_float,
                                           int64_t row, int i) {
  if (is_float) {
    load_as(c, static_cast<const float*>(table) + row, i, 0, true);
  } else if constexpr (kSize == 8) {
    load_as(c, static_cast<const E*>(table) + row, i, 0, true);
  } else {
    unpack<E>(c, *reinterpret_cast<const uint2*>(static_cast<const E*>(table) + row + i));
  }
}

// Where head `head` of k (which == 1) or v (which == 2) goes; null where it does not.
struct Target {
  char* row = nullptr;
  float* scale = nullptr;
};
template <class E, bool kCodes, class A>
__device__ __forceinline__ Target target_of(const A& a, int which, int64_t slot, int head,
                                            int dim) {
  if (slot < 0 || (which != 1 && which != 2)) return {};
  const Slot where = split_slot(slot, a.block_size, a.block_shift);
  const int64_t at = where.block * a.block_stride +
                     where.position * static_cast<int64_t>(a.cache_position) + head * dim;
  return {(which == 1 ? a.key_cache : a.value_cache) + at * (kCodes ? 1 : sizeof(E)),
          (which == 1 ? a.k_scale : a.v_scale) + slot * a.scale_slot + head * a.scale_head};
}

// A head, as a lane holds it, to its place. Every lane of the warp calls.
template <bool kCodes, class E, class V, class A>
__device__ __forceinline__ void cache_head(const A& a, const Target& target, const Part<E, V>& part,
                                           int at_first, int at_second, int lane) {
  using Codes = std::conditional_t<sizeof(V) == 16, uint2, uint32_t>;
  constexpr int kWords = Part<E, V>::kWords;
  if constexpr (!kCodes) {
    if (!target.row) return;
    E* to = reinterpret_cast<E*>(target.row);
    *reinterpret_cast<V*>(to + at_first) = part.first;
    *reinterpret_cast<V*>(to + at_second) = part.second;
    return;
  }
  const HalfWords<kWords> row = part.words();
  const uint32_t top = a.dynamic ? group_max(top_bits<E>(row), 1 << a.lane_bits) : nan_bits<E>(row);
  if (!target.row) return;
  float scale;
  if (a.dynamic) {
    scale = dynamic_scale(top, a.fp8);
    if (lane == 0) *target.scale = scale;
  } else {
    scale = *target.scale;
  }
  alignas(8) uint32_t code[kWords / 2];
  half_codes<E>(code, row, scale, top, a.fp8, a.soft);
  *reinterpret_cast<Codes*>(target.row + at_first) = reinterpret_cast<const Codes*>(code)[0];
  *reinterpret_cast<Codes*>(target.row + at_second) = reinterpret_cast<const Codes*>(code)[1];
}

}  // namespace fastinfer::cuda
