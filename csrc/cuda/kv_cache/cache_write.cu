// reshape_and_cache: tokens [T, Hkv, D] into their slots of caches [num_blocks, P, Hkv, D].
//
// blockIdx.y picks K or V, blockIdx.x a group of tokens. A float cache is a copy of bytes: a thread
// moves packs of 16 bytes (or single elements where something is not aligned), kUnroll of them in
// flight, and heads that lie next to each other on both sides are one run. An 8-bit cache is
// written head by head, 1 to 32 lanes per head (cache_write.cuh).
//
// The token's bytes and its slot are loaded together: a single token costs one trip to memory.
// Writes KV, so it never lets the next kernel start early.
#include "../common/launch.cuh"
#include "cache_write.cuh"
#include "divide.cuh"
#include "kv_cache.h"

namespace fastinfer::cuda {
namespace {

constexpr int kThreads = 256, kUnroll = 4;

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
  Divisor token_units, run_units;
};

template <class Unit>
__device__ __forceinline__ void write_units(const BytesParams& p, int64_t first, uint32_t units) {
  const BytesSide& s = p.side[blockIdx.y];
  for (uint32_t base = threadIdx.x; base < units; base += kUnroll * kThreads) {
    Unit value[kUnroll];
    int64_t slot[kUnroll], offset[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t i = base + u * kThreads;
      slot[u] = -1;
      if (i < units) {
        uint32_t in_token, in_run;
        const int64_t t = first + p.token_units(i, in_token);
        const int64_t run = p.run_units(in_token, in_run);
        const int64_t byte = static_cast<int64_t>(in_run) * sizeof(Unit);
        value[u] = *reinterpret_cast<const Unit*>(s.tokens + t * s.token_stride +
                                                  run * s.token_run_stride + byte);
        slot[u] = p.slots[t];
        offset[u] = run * s.cache_run_stride + byte;
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (slot[u] < 0) continue;
      const Slot at = split_slot(slot[u], p.block_size);
      *reinterpret_cast<Unit*>(s.cache + at.block * s.block_stride +
                               at.position * s.position_stride + offset[u]) = value[u];
    }
  }
}

__global__ void __launch_bounds__(kThreads, 4)
    write_bytes_kernel(const __grid_constant__ BytesParams p) {
  grid_wait();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.tokens_per_cta;
  const int64_t left = p.tokens - first;
  const uint32_t count = static_cast<uint32_t>(left < p.tokens_per_cta ? left : p.tokens_per_cta);
  const uint32_t units = count * p.token_units.value;
  if (p.unit == 16) {
    write_units<uint4>(p, first, units);
  } else if (p.unit == 4) {
    write_units<uint32_t>(p, first, units);
  } else {
    write_units<uint16_t>(p, first, units);
  }
}

// ---- 8-bit caches
struct CodesParams {
  CacheStore store[2];
  const void* tokens[2];
  int64_t token_stride[2], head_stride[2];  // elements
  bool packs[2];                            // of the tokens
  Indices slots;
  int64_t num_tokens, block_size;
  int32_t tokens_per_cta, lanes_log2;
  Divisor heads;
};

template <class T>
__device__ __forceinline__ void as_floats(const Pack<T>& pack, float (&x)[Pack<T>::kSize]) {
#pragma unroll
  for (int j = 0; j < Pack<T>::kSize; ++j) x[j] = to_float(pack.v[j]);
}

// Heads of more than 32 packs, one at a time.
template <class T>
__device__ void write_long_heads(const CodesParams& p, int64_t first, uint32_t heads) {
  constexpr int kSize = Pack<T>::kSize;
  const int side = blockIdx.y, lane = threadIdx.x % 32;
  const CacheStore& store = p.store[side];
  for (uint32_t item = threadIdx.x / 32; item < heads; item += kThreads / 32) {
    uint32_t head;
    const int64_t t = first + p.heads(item, head);
    const int64_t slot = p.slots[t];
    if (slot < 0) continue;  // the same for the whole warp
    const T* x = static_cast<const T*>(p.tokens[side]) + t * p.token_stride[side] +
                 head * p.head_stride[side];
    float value[kSize];
    uint32_t top = 0;
    for (int64_t i = lane * kSize; store.scale.dynamic && i < store.dim; i += 32 * kSize) {
      as_floats(load_pack(x, i, store.dim, p.packs[side]), value);
      top = max(top, top_bits(value));
    }
    const Slot at = split_slot(slot, p.block_size);
    const float scale = head_scale(store, at, head, group_max(top, 32), lane == 0);
    for (int64_t i = lane * kSize; i < store.dim; i += 32 * kSize) {
      as_floats(load_pack(x, i, store.dim, p.packs[side]), value);
      store_head_pack<T>(store, at, head, i, value, scale);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    write_codes_kernel(const __grid_constant__ CodesParams p) {
  constexpr int kSize = Pack<T>::kSize;
  grid_wait();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.tokens_per_cta;
  const int64_t left = p.num_tokens - first;
  const uint32_t count = static_cast<uint32_t>(left < p.tokens_per_cta ? left : p.tokens_per_cta);
  const uint32_t heads = count * p.heads.value;
  const int side = blockIdx.y, lanes = 1 << p.lanes_log2;
  const CacheStore& store = p.store[side];
  if (store.dim > 32 * kSize) return write_long_heads<T>(p, first, heads);
  const int64_t i = (threadIdx.x & (lanes - 1)) * kSize;
  const uint32_t group = threadIdx.x >> p.lanes_log2, groups = kThreads >> p.lanes_log2;
  const bool inside = i < store.dim;
  for (uint32_t base = group; base - group < heads; base += kUnroll * groups) {
    Pack<T> pack[kUnroll];
    int64_t slot[kUnroll];
    uint32_t head[kUnroll];
    float scale[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t item = base + u * groups;
      slot[u] = -1, head[u] = 0, scale[u] = 1.0f;
      pack[u] = Pack<T>{};
      if (item < heads && inside) {
        const int64_t t = first + p.heads(item, head[u]);
        slot[u] = p.slots[t];
        pack[u] = load_pack(static_cast<const T*>(p.tokens[side]) + t * p.token_stride[side] +
                                head[u] * p.head_stride[side],
                            i, store.dim, p.packs[side]);
        if (!store.scale.dynamic) scale[u] = store.scale.data[head[u] * store.scale.head];
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float x[kSize];
      as_floats(pack[u], x);
      const uint32_t top = store.scale.dynamic ? group_max(top_bits(x), lanes) : 0;
      if (slot[u] < 0) continue;
      const Slot at = split_slot(slot[u], p.block_size);
      if (store.scale.dynamic) scale[u] = head_scale(store, at, head[u], top, i == 0);
      store_head_pack<T>(store, at, head[u], i, x, scale[u]);
    }
  }
}

// ---- host
// Tokens per CTA: enough for kUnroll units per thread, fewer where SMs would stay idle.
int32_t tokens_of_cta(int64_t tokens, int64_t units_per_token) {
  const int64_t most = kThreads * kUnroll / units_per_token;
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
  b.unit = bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 2;
  b.slots = Indices(p.slots, p.slot_dtype, p.slot_stride);
  b.tokens = tokens, b.block_size = p.block_size;
  b.token_units = Divisor(run / b.unit * runs), b.run_units = Divisor(run / b.unit);
  b.tokens_per_cta = tokens_of_cta(tokens, b.token_units.value);
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
  const int lanes = lanes_of_head(ceil_div(p.dim, kSize));
  while (1 << c.lanes_log2 < lanes) ++c.lanes_log2;
  c.slots = Indices(p.slots, p.slot_dtype, p.slot_stride);
  c.num_tokens = tokens, c.block_size = p.block_size;
  c.heads = Divisor(p.heads);
  c.tokens_per_cta = tokens_of_cta(tokens, p.heads * lanes);
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
