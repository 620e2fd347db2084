// reshape_and_cache: tokens [T, Hkv, D] into their slots of caches [num_blocks, P, Hkv, D].
//
// blockIdx.y picks K or V, blockIdx.x a group of tokens. A float cache is a copy of bytes: a thread
// moves packs of 16 bytes (or single elements where something is not aligned), kUnroll of them in
// flight, and heads that lie next to each other on both sides are one run. An 8-bit cache is
// written head by head, 1 to 32 lanes per head (cache_write.cuh), much work in whole lines
// (write_lines.cuh).
//
// The token's bytes and its slot are loaded together: a single token costs one trip to memory.
// Writes KV, so it never lets the next kernel start early.
#include "../common/launch.cuh"
#include "cache_write.cuh"
#include "divide.cuh"
#include "half_codes.cuh"
#include "kv_cache.h"
#include "write_lines.cuh"
#include "write_rows.cuh"

namespace fastinfer::cuda {
namespace {

constexpr int kThreads = 128, kUnroll = 4, kHeadUnroll = 1;

// ---- float caches: bytes
struct BytesSide {
  const char* tokens;
  char* cache;
  int64_t token_stride, token_run_stride, block_stride, position_stride, cache_run_stride;  // bytes
};
struct BytesParams {
  BytesSide side[2];
  Indices slots;
  int64_t tokens, block_size;
  int32_t tokens_per_cta, unit;  // bytes of one access
  bool merged;
  Divisor token_units, run_units;
};

// kMerged: the token is one run on both sides.
template <class Unit, bool kMerged>
__device__ __forceinline__ void write_units(const BytesParams& p, int64_t first, uint32_t units) {
  const BytesSide& s = p.side[blockIdx.y];
  for (uint32_t base = threadIdx.x; base < units; base += kUnroll * kThreads) {
    Unit value[kUnroll];
    int64_t slot[kUnroll];
    uint32_t unit[kUnroll];  // of the token
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t i = base + u * kThreads;
      slot[u] = -1;
      if (i < units) {
        const int64_t t = first + p.token_units(i, unit[u]);
        slot[u] = p.slots[t];
        const char* from = s.tokens + t * s.token_stride;
        uint32_t in_run = unit[u];
        if constexpr (!kMerged) from += p.run_units(unit[u], in_run) * s.token_run_stride;
        value[u] = reinterpret_cast<const Unit*>(from)[in_run];
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (slot[u] < 0) continue;
      const Slot at = split_slot(slot[u], p.block_size);
      char* to = s.cache + at.block * s.block_stride + at.position * s.position_stride;
      uint32_t in_run = unit[u];
      if constexpr (!kMerged) to += p.run_units(unit[u], in_run) * s.cache_run_stride;
      reinterpret_cast<Unit*>(to)[in_run] = value[u];
    }
  }
}

__global__ void __launch_bounds__(kThreads, 10)
    write_bytes_kernel(const __grid_constant__ BytesParams p) {
  grid_wait();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.tokens_per_cta;
  const int64_t left = p.tokens - first;
  const uint32_t count = static_cast<uint32_t>(left < p.tokens_per_cta ? left : p.tokens_per_cta);
  const uint32_t units = count * p.token_units.value;
  if (p.unit == 16 && p.merged) {
    write_units<uint4, true>(p, first, units);
  } else if (p.unit == 16) {
    write_units<uint4, false>(p, first, units);
  } else if (p.unit == 4) {
    write_units<uint32_t, false>(p, first, units);
  } else {
    write_units<uint16_t, false>(p, first, units);
  }
}

// ---- 8-bit caches
struct CodesParams {
  CacheStore store[2];
  const void* tokens[2];
  int64_t token_stride[2], head_stride[2];  // elements
  bool packs[2];                            // of the tokens
  bool by_sixteen;
  Indices slots;
  int64_t num_tokens, block_size;
  int32_t tokens_per_cta, lanes_log2;
  Divisor heads;
};

// Any alignment, head dim and type: a pack per lane and round; the tokens are read again for the
// codes.
template <class T>
__device__ void write_any_heads(const CodesParams& p, int64_t first, uint32_t heads) {
  constexpr int kSize = Pack<T>::kSize;
  const int side = blockIdx.y, lanes = 1 << p.lanes_log2, lane = threadIdx.x & (lanes - 1);
  const CacheStore& store = p.store[side];
  const uint32_t group = threadIdx.x >> p.lanes_log2, groups = kThreads >> p.lanes_log2;
#pragma unroll 1
  for (uint32_t base = 0; base < heads;
       base += groups) {  // the same number of rounds for all lanes
    const bool active = base + group < heads;
    uint32_t head = 0;
    const int64_t t = active ? first + p.heads(base + group, head) : 0;
    const int64_t slot = active ? p.slots[t] : -1;
    const T* x = static_cast<const T*>(p.tokens[side]) + t * p.token_stride[side] +
                 head * p.head_stride[side];
    float value[kSize];
    uint32_t top = 0;
    if (store.scale.dynamic) {
      for (int64_t i = lane * kSize; active && i < store.dim; i += lanes * kSize) {
        as_floats<T>(load_pack(x, i, store.dim, p.packs[side]), value);
        top = max(top, top_bits(value));
      }
      top = group_max(top, lanes);
    }
    if (slot < 0) continue;
    const Slot at = split_slot(slot, p.block_size);
    const float scale = head_scale(store, at, head, top, lane == 0);
    for (int64_t i = lane * kSize; i < store.dim; i += lanes * kSize) {
      as_floats<T>(load_pack(x, i, store.dim, p.packs[side]), value);
      store_codes(cache_row(store, at, head), i, store.dim, store.packs, value, Quotient(scale),
                  store.dtype == DType::f8e4m3, store.soft);
    }
  }
}

// 16-bit tokens, everything aligned, heads of at most 512 elements: 16 elements per lane.
template <class T>
__device__ __forceinline__ void write_half_heads(const CodesParams& p, int64_t first,
                                                 uint32_t heads) {
  const int side = blockIdx.y, lanes = 1 << p.lanes_log2, lane = threadIdx.x & (lanes - 1);
  const CacheStore& store = p.store[side];
  const bool inside = lane * 16 < store.dim, fp8 = store.dtype == DType::f8e4m3;
  const uint32_t group = threadIdx.x >> p.lanes_log2, groups = kThreads >> p.lanes_log2;
  for (uint32_t base = 0; base < heads; base += kHeadUnroll * groups) {
    HalfRow row[kHeadUnroll];
    int64_t slot[kHeadUnroll];
    uint32_t head[kHeadUnroll];
    float scale[kHeadUnroll];
#pragma unroll
    for (int u = 0; u < kHeadUnroll; ++u) {
      const uint32_t item = base + u * groups + group;
      slot[u] = -1, head[u] = 0, scale[u] = 1.0f;
      row[u] = HalfRow{};
      if (item < heads && inside) {
        const int64_t t = first + p.heads(item, head[u]);
        slot[u] = p.slots[t];
        const uint4* from = reinterpret_cast<const uint4*>(
            static_cast<const T*>(p.tokens[side]) + t * p.token_stride[side] +
            head[u] * p.head_stride[side] + lane * 16);
        reinterpret_cast<uint4*>(&row[u])[0] = from[0];
        reinterpret_cast<uint4*>(&row[u])[1] = from[1];
        if (!store.scale.dynamic) scale[u] = store.scale.data[head[u] * store.scale.head];
      }
    }
#pragma unroll
    for (int u = 0; u < kHeadUnroll; ++u) {
      uint32_t top = top_bits<T>(row[u]);
      if (store.scale.dynamic) top = group_max(top, lanes);
      if (slot[u] < 0) continue;
      const Slot at = split_slot(slot[u], p.block_size);
      if (store.scale.dynamic) scale[u] = head_scale(store, at, head[u], top, lane == 0);
      char* to = store.cache + at.block * store.block_stride + at.position * store.position_stride +
                 head[u] * store.head_stride + lane * 16;
      uint32_t code[4];
      half_codes<T>(code, row[u], scale[u], top, fp8, store.soft);
      *reinterpret_cast<uint4*>(to) = make_uint4(code[0], code[1], code[2], code[3]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 12)
    write_codes_kernel(const __grid_constant__ CodesParams p) {
  grid_wait();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.tokens_per_cta;
  const int64_t left = p.num_tokens - first;
  const uint32_t count = static_cast<uint32_t>(left < p.tokens_per_cta ? left : p.tokens_per_cta);
  const uint32_t heads = count * p.heads.value;
  if constexpr (sizeof(T) == 2) {
    if (p.by_sixteen) return write_half_heads<T>(p, first, heads);
  }
  write_any_heads<T>(p, first, heads);
}

// ---- host
// Tokens per CTA: enough for `unroll` units per thread, fewer where SMs would stay idle.
int32_t tokens_of_cta(int64_t tokens, int64_t units_per_token, int unroll) {
  const int64_t most = kThreads * unroll / units_per_token;
  const int64_t spread = tokens / (2 * device_facts().sms);
  const int64_t n = most < spread ? most : spread;
  return static_cast<int32_t>(n > 1 ? n : 1);
}

int write_bytes(const cpu::CacheWriteParams& p, int64_t tokens, void* stream) {
  const int64_t size = dtype_size(p.cache_dtype);
  const cpu::CacheSide* sides[2] = {&p.key, &p.value};
  BytesParams b{};
  const bool merged = p.key.token_head_stride == p.dim && p.key.head_stride == p.dim &&
                      p.value.token_head_stride == p.dim && p.value.head_stride == p.dim;
  const int64_t run = p.dim * size * (merged ? p.heads : 1), runs = merged ? 1 : p.heads;
  int64_t bits = run;
  for (int i = 0; i < 2; ++i) {
    const cpu::CacheSide& s = *sides[i];
    b.side[i] = {static_cast<const char*>(s.tokens),
                 static_cast<char*>(s.cache),
                 s.token_stride * size,
                 s.token_head_stride * size,
                 s.block_stride * size,
                 s.position_stride * size,
                 s.head_stride * size};
    const BytesSide& o = b.side[i];
    bits |= reinterpret_cast<int64_t>(o.tokens) | reinterpret_cast<int64_t>(o.cache);
    bits |= o.token_stride | o.block_stride | o.position_stride;
    if (!merged) bits |= o.token_run_stride | o.cache_run_stride;
  }
  b.merged = merged;
  b.unit = bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 2;
  b.slots = Indices(p.slots, p.slot_dtype, p.slot_stride);
  b.tokens = tokens, b.block_size = p.block_size;
  b.token_units = Divisor(run / b.unit * runs), b.run_units = Divisor(run / b.unit);
  b.tokens_per_cta = tokens_of_cta(tokens, b.token_units.value, kUnroll);
  const dim3 grid(static_cast<unsigned>(ceil_div(tokens, b.tokens_per_cta)), 2);
  return launch(write_bytes_kernel, grid, kThreads, 0, stream, b);
}

template <class T>
int write_codes(const cpu::CacheWriteParams& p, int64_t tokens, void* stream) {
  constexpr int kSize = Pack<T>::kSize;
  const cpu::CacheSide* sides[2] = {&p.key, &p.value};
  const bool soft = force_portable();
  CodesParams c{};
  for (int i = 0; i < 2; ++i) {
    const cpu::CacheSide& s = *sides[i];
    c.store[i] = cache_store(s, p, kSize, soft);
    c.tokens[i] = s.tokens;
    c.token_stride[i] = s.token_stride, c.head_stride[i] = s.token_head_stride;
    c.packs[i] = packs_fit(s.tokens, p.dim, sizeof(T), {s.token_stride, s.token_head_stride});
  }
  c.by_sixteen = sizeof(T) == 2 && p.dim % 16 == 0 && p.dim <= 512;
  for (int i = 0; i < 2; ++i) {
    const cpu::CacheSide& s = *sides[i];
    c.by_sixteen = c.by_sixteen && c.packs[i] &&
                   packs_fit(s.cache, p.dim, 1, {s.block_stride, s.position_stride, s.head_stride});
  }
  const int lanes = lanes_of_head(ceil_div(p.dim, c.by_sixteen ? 16 : kSize));
  while (1 << c.lanes_log2 < lanes) ++c.lanes_log2;
  c.slots = Indices(p.slots, p.slot_dtype, p.slot_stride);
  c.num_tokens = tokens, c.block_size = p.block_size;
  c.heads = Divisor(p.heads);
  if constexpr (sizeof(T) == 2) {
    if (c.by_sixteen && rows_fit(p, tokens))
      return lines_fit(p, tokens) ? write_lines<T>(p, tokens, soft, stream)
                                  : write_rows<T>(p, tokens, soft, stream);
  }
  c.tokens_per_cta = tokens_of_cta(tokens, p.heads * lanes, kHeadUnroll);
  const dim3 grid(static_cast<unsigned>(ceil_div(tokens, c.tokens_per_cta)), 2);
  return launch(write_codes_kernel<T>, grid, kThreads, 0, stream, c);
}

}  // namespace

int launch_write_cache(const cpu::CacheWriteParams& p, int64_t tokens, void* stream) {
  if (!p.key.scale.data) return write_bytes(p, tokens, stream);
  return with_float(p.token_dtype,
                    [&](auto t) { return write_codes<decltype(t)>(p, tokens, stream); });
}

}  // namespace fastinfer::cuda
