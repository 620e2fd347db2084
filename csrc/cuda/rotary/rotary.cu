// Rotary embedding of q and k (csrc/cpu/rotary.cpp), and with a cache the write of the rotated k
// and of v into their slots, in one launch:
//
//   a' = a c - b s      half-split:  a = x[i],  b = x[i + half]
//   b' = b c + a s      interleaved: a = x[2i], b = x[2i + 1]
//
// q, k [B, S, H, D] with any strides (packed tokens: B = 1), cos, sin [max_pos, half] of fp32 or
// q's type, fp32 arithmetic, one rounding; the rounded k is what is cached
// (kv_cache/cache_write.cuh).
//
// A head belongs to `lanes` neighbouring lanes (a power of two of at most a warp). A slot of a lane
// is two packs of 16 bytes: the kSize pairs [slot * kSize, ..) as a pack of a's and one of b's, or
// two neighbouring packs of interleaved pairs; behind them two neighbouring packs of columns that
// are not rotated. Both packs then use the same kSize values of cos and sin. Heads are numbered q,
// k, v within a token. Heads that need more than one round of slots are read again for the cache.
#include "rotary.h"

#include "../common/row_group.cuh"
#include "../kv_cache/cache_write.cuh"
#include "rotary_parts.cuh"

namespace fastinfer::cuda {
namespace {

struct RotaryLaunch {
  cpu::RotaryParams p;
  cpu::RotaryTensor tensor[3];  // q, k, v
  CacheStore cache[2];          // of k and v
  const void* slots;
  int64_t slot_stride, block_size;
  DType slot_dtype;
  int64_t tokens;
  int heads[3], groups;
  int lanes, lane_bits, slots_rotated, slots_all;
  bool packs, table_packs, cached, dynamic;
};

// What a lane does in one slot.
struct Place {
  int first, second;          // elements
  int first_end, second_end;  // where the elements of each pack end
  bool rotated;
};

template <int kSize>
__device__ __forceinline__ Place place_of(const RotaryLaunch& a, int slot, bool rotates) {
  const int dim = static_cast<int>(a.p.dim), half = static_cast<int>(a.p.half);
  if (rotates && slot < a.slots_rotated) {
    if (a.p.interleaved)
      return {2 * slot * kSize, (2 * slot + 1) * kSize, 2 * half, 2 * half, true};
    return {slot * kSize, half + slot * kSize, half, 2 * half, true};
  }
  const int at = rotates ? 2 * half + 2 * (slot - a.slots_rotated) * kSize : 2 * slot * kSize;
  return {at, at + kSize, dim, dim, false};
}

template <class E>
__device__ __forceinline__ uint4 load_part(const E* row, int i, int end, bool packs) {
  return i < end ? load_pack(row, i, end, packs) : uint4{};
}

template <class E>
__device__ __forceinline__ void cache_part(CacheStore store, Slot slot, int64_t head, int i,
                                           int end, const uint4& pack, float scale) {
  if (i >= end) return;
  float x[Pack<E>::kSize];
  unpack<E>(x, pack);
  store.dim = end;
  store_head_pack<E>(store, slot, head, i, x, scale);
}

template <class E>
__global__ void __launch_bounds__(kRotaryThreads, 3)
    rotary_kernel(const __grid_constant__ RotaryLaunch a) {
  constexpr int kSize = Pack<E>::kSize;
  const cpu::RotaryParams& p = a.p;
  const int lane = threadIdx.x & (a.lanes - 1);
  const int group = (blockIdx.y * blockDim.x + threadIdx.x) >> a.lane_bits;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool live = token < a.tokens && group < a.groups;
  const int64_t t = live ? token : 0;
  int64_t b = 0, s = t;
  if (t >= p.seq) b = divide(t, p.seq), s = t - b * p.seq;
  grid_launch_dependents();
  grid_wait();
  int64_t position = s, slot = -1;
  if (p.positions)
    position = index_at(p.positions, p.position_dtype, b * p.position_batch + s * p.position_token);
  if (a.cached && live) slot = index_at(a.slots, a.slot_dtype, t * a.slot_stride);

  const E* in[kRotaryHeads];
  E* out[kRotaryHeads];
  int head[kRotaryHeads], which[kRotaryHeads];  // 0, 1, 2: q, k, v; 3: none
#pragma unroll
  for (int j = 0; j < kRotaryHeads; ++j) {
    head[j] = group + j * a.groups;
    which[j] = 0;
    while (which[j] < 3 && head[j] >= a.heads[which[j]]) head[j] -= a.heads[which[j]++];
    if (!live) which[j] = 3;
    const cpu::RotaryTensor& tensor = a.tensor[which[j] < 3 ? which[j] : 0];
    in[j] = static_cast<const E*>(tensor.in) + b * tensor.in_batch + s * tensor.in_token +
            head[j] * tensor.in_head;
    out[j] = static_cast<E*>(tensor.out) + b * tensor.out_batch + s * tensor.out_token +
             head[j] * tensor.out_head;
  }
  const auto caches = [&](int j) { return slot >= 0 && (which[j] == 1 || which[j] == 2); };

  const int64_t table_size = dtype_size(p.table_dtype);
  const auto table = [&](const void* base, int64_t stride) {
    return static_cast<const char*>(base) + position * stride * table_size;
  };
  uint4 first[kRotaryHeads] = {}, second[kRotaryHeads] = {};
  uint32_t top[kRotaryHeads] = {};
  for (int n = lane; n < a.slots_all; n += a.lanes) {
    bool needed[kRotaryHeads];
#pragma unroll
    for (int j = 0; j < kRotaryHeads; ++j) {
      const Place at = place_of<kSize>(a, n, which[j] != 2);
      needed[j] =
          which[j] < 3 && at.first < at.first_end && (at.rotated || caches(j) || in[j] != out[j]);
      if (!needed[j]) continue;
      first[j] = load_pack(in[j], at.first, at.first_end, a.packs);
      second[j] = load_part(in[j], at.second, at.second_end, a.packs);
    }
    float c[kSize], sine[kSize];
    if (n < a.slots_rotated) {
      const int half = static_cast<int>(p.half), i = n * kSize;
      load_floats(c, table(p.cos, p.cos_stride), p.table_dtype, i, half, a.table_packs);
      load_floats(sine, table(p.sin, p.sin_stride), p.table_dtype, i, half, a.table_packs);
    }
#pragma unroll
    for (int j = 0; j < kRotaryHeads; ++j) {
      if (!needed[j]) continue;
      const Place at = place_of<kSize>(a, n, which[j] != 2);
      if (at.rotated) rotate<E>(first[j], second[j], c, sine, p.interleaved);
      if (at.rotated || in[j] != out[j]) {
        store_pack(out[j], at.first, at.first_end, a.packs, first[j]);
        if (at.second < at.second_end)
          store_pack(out[j], at.second, at.second_end, a.packs, second[j]);
      }
      if (caches(j)) {
        float x[kSize];
        unpack<E>(x, first[j]);
        top[j] = max(top[j], top_bits(x));
        unpack<E>(x, second[j]);
        top[j] = max(top[j], top_bits(x));
      }
    }
  }
  if (!a.cached) return;

  const bool again = a.slots_all > a.lanes;
#pragma unroll
  for (int j = 0; j < kRotaryHeads; ++j) {
    if (a.dynamic) top[j] = group_max(top[j], a.lanes);  // with every lane of the warp
    if (!caches(j)) continue;
    const CacheStore& store = a.cache[which[j] - 1];
    const Slot where = split_slot(slot, a.block_size);
    const float scale = head_scale(store, where, head[j], top[j], lane == 0);
    for (int n = lane; n < a.slots_all; n += a.lanes) {
      const Place at = place_of<kSize>(a, n, which[j] != 2);
      if (again) {  // written by this thread
        first[j] = load_part(out[j], at.first, at.first_end, a.packs);
        second[j] = load_part(out[j], at.second, at.second_end, a.packs);
      }
      cache_part<E>(store, where, head[j], at.first, at.first_end, first[j], scale);
      cache_part<E>(store, where, head[j], at.second, at.second_end, second[j], scale);
    }
  }
}

// Host side: can the rows of a tensor be moved in packs?
template <class E>
bool tensor_packs(const cpu::RotaryTensor& t, int64_t dim, int64_t tokens, int64_t seq) {
  const int64_t batch = tokens > seq ? 1 : 0, token = seq > 1 ? 1 : 0, head = t.heads > 1 ? 1 : 0;
  return packs_fit(t.in, dim, sizeof(E),
                   {batch * t.in_batch, token * t.in_token, head * t.in_head}) &&
         packs_fit(t.out, dim, sizeof(E),
                   {batch * t.out_batch, token * t.out_token, head * t.out_head});
}

}  // namespace

int rotary(const cpu::RotaryParams& p, const cpu::CacheWriteParams* write, int64_t tokens,
           void* stream) {
  return with_float(p.dtype, [&](auto element) {
    using E = decltype(element);
    constexpr int kSize = Pack<E>::kSize;
    RotaryLaunch a{};
    a.p = p;
    a.tensor[0] = p.q, a.tensor[1] = p.k;
    const int64_t half = p.half;
    a.packs = half % kSize == 0 && tensor_packs<E>(p.q, p.dim, tokens, p.seq) &&
              (!p.k.in || tensor_packs<E>(p.k, p.dim, tokens, p.seq));
    a.cached = write != nullptr;
    bool soft = false;
    if (write) {
      const cpu::CacheSide& v = write->value;
      a.tensor[2] = {v.tokens,
                     v.tokens,
                     0,
                     v.token_stride,
                     v.token_head_stride,
                     0,
                     v.token_stride,
                     v.token_head_stride,
                     write->heads};
      a.packs = a.packs && tensor_packs<E>(a.tensor[2], p.dim, tokens, p.seq);
      soft = write->key.scale.data && force_portable();
      a.cache[0] = cache_store(write->key, *write, kSize, soft);
      a.cache[1] = cache_store(write->value, *write, kSize, soft);
      if (half % kSize != 0) a.cache[0].packs = false;  // its packs start at any element
      a.slots = write->slots, a.slot_stride = write->slot_stride, a.slot_dtype = write->slot_dtype;
      a.block_size = write->block_size;
      a.dynamic = write->key.scale.dynamic || write->value.scale.dynamic;
    }
    const int64_t table_size = dtype_size(p.table_dtype);
    a.table_packs = half % kSize == 0 && packs_fit(p.cos, half, table_size, {p.cos_stride}) &&
                    packs_fit(p.sin, half, table_size, {p.sin_stride});
    const RotaryFit fit{a.packs, a.table_packs, a.cache[0].packs && a.cache[1].packs, soft};
    int error = 0;
    if (rotary_dense(p, write, tokens, fit, stream, error)) return error;
    const int64_t rotated = ceil_div(half, kSize);
    const int64_t tail = ceil_div(p.dim - 2 * half, 2 * kSize);
    const int64_t plain = write ? ceil_div(p.dim, 2 * kSize) : 0;
    a.slots_rotated = static_cast<int>(rotated);
    a.slots_all = static_cast<int>(rotated + tail > plain ? rotated + tail : plain);
    a.lanes = lanes_of_head(a.slots_all);
    while (1 << a.lane_bits < a.lanes) ++a.lane_bits;
    a.tokens = tokens;
    int64_t heads = 0;
    for (int i = 0; i < 3; ++i) heads += a.heads[i] = static_cast<int>(a.tensor[i].heads);
    const RotaryLayout layout = rotary_layout(tokens, heads, a.lanes, device_facts().sms);
    a.groups = layout.groups;
    const dim3 grid(static_cast<unsigned>(ceil_div(tokens, layout.tokens)),
                    static_cast<unsigned>(layout.parts));
    const dim3 block(layout.width, layout.tokens);
    return launch(rotary_kernel<E>, grid, block, 0, stream, a);
  });
}

}  // namespace fastinfer::cuda
