// gather_cache: cached tokens of several sequences into packed tensors [num_tokens, Hkv, D].
//
//   out[t] = cache[block_table[b, q / P], q % P] (* scale), q = seq_starts[b] + t - cu_seqlens[b],
//   b = the sequence with cu_seqlens[b] <= t < cu_seqlens[b + 1]; 0 for tokens past the last one
//
// blockIdx.y picks K or V, blockIdx.x a group of tokens. First a warp per token finds the sequence
// (32 pivots of cu_seqlens at a time) and reads the block id; then the heads are moved, 1 to 32
// lanes per head, 16 bytes of output per lane. A cache of the output's type is copied bit by bit.
#include "../common/launch.cuh"
#include "cache_write.cuh"
#include "divide.cuh"
#include "kv_cache.h"

namespace fastinfer::cuda {
namespace {

constexpr int kThreads = 256, kUnroll = 4, kMaxTokens = 64;

struct GatherSide {
  char *tokens, *cache;
  int64_t token_stride, token_head_stride, block_stride, position_stride, head_stride;  // elements
  cpu::ScaleView scale;
};
struct GatherParams {
  GatherSide side[2];
  Indices cu_seqlens, seq_starts;
  const void* block_table;
  int64_t row_stride, col_stride, num_tokens, batch, block_size, dim;
  int32_t tokens_per_cta, lanes_log2;
  DType table_dtype, cache_dtype;
  Divisor heads;
  bool same_type, packs, has_starts, soft;  // packs: both sides, of a type that has a fast way
};

// Where token t is cached; block -1: nowhere, its row is zero. The whole warp calls.
__device__ __forceinline__ Slot find_token(const GatherParams& p, int64_t t) {
  const int lane = threadIdx.x % 32;
  int64_t low = 0, high = p.batch + 1;  // cu_seqlens[low] <= t < cu_seqlens[high]
  while (high - low > 1) {
    const int64_t step = (high - low + 31) / 32, i = low + lane * step;
    const bool before = i < high && p.cu_seqlens[i] <= t;
    const int last = __popc(__ballot_sync(kAllLanes, before)) - 1;
    low += (last > 0 ? last : 0) * step;
    high = low + step < high ? low + step : high;
  }
  if (low >= p.batch) return {-1, 0};
  const int64_t start = p.has_starts ? p.seq_starts[low] : 0;
  const Slot at = split_slot(start + t - p.cu_seqlens[low], p.block_size);
  const int64_t block =
      index_at(p.block_table, p.table_dtype, low * p.row_stride + at.block * p.col_stride);
  return {block, at.position};
}

struct CachedHead {
  const char* row;
  float scale;
};
__device__ __forceinline__ CachedHead cached_head(const GatherParams& p, const GatherSide& s,
                                                  Slot at, int64_t head) {
  const int64_t size = dtype_size(p.cache_dtype);
  const char* row =
      s.cache +
      (at.block * s.block_stride + at.position * s.position_stride + head * s.head_stride) * size;
  if (!s.scale.data) return {row, 1.0f};
  return {row, s.scale.data[at.block * s.scale.block + at.position * s.scale.position +
                            head * s.scale.head]};
}

// Element i of a cached row, of any type.
__device__ __forceinline__ float cached_value(const char* row, int64_t i, DType type, bool soft) {
  if (type == DType::f8e4m3) return from_e4m3(static_cast<uint8_t>(row[i]), soft);
  if (type == DType::i8) return static_cast<float>(static_cast<signed char>(row[i]));
  if (type == DType::bf16) return to_float(reinterpret_cast<const __nv_bfloat16*>(row)[i]);
  if (type == DType::f16) return to_float(reinterpret_cast<const __half*>(row)[i]);
  return reinterpret_cast<const float*>(row)[i];
}

// Four codes of a word.
__device__ __forceinline__ void decode(uint32_t word, bool fp8, bool soft, float* x) {
  if (!fp8) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      x[j] = static_cast<float>(static_cast<int32_t>(word << (24 - 8 * j)) >> 24);
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) x[j] = from_e4m3(static_cast<uint8_t>(word >> 8 * j), soft);
}

// Pack i of kUnroll heads at a time; kCodes: an 8-bit cache, otherwise bits are copied.
template <class T, bool kCodes>
__device__ __forceinline__ void gather_packs(const GatherParams& p, const Slot* places,
                                             int64_t first, uint32_t heads, int64_t i) {
  constexpr int kSize = Pack<T>::kSize, kWords = kCodes ? kSize / 4 : 4;
  struct alignas(4 * kWords) Raw {
    uint32_t word[kWords];
  };
  const GatherSide& s = p.side[blockIdx.y];
  const uint32_t groups = kThreads >> p.lanes_log2;
  const int64_t byte = i * static_cast<int64_t>(kCodes ? 1 : sizeof(T));
  for (uint32_t base = threadIdx.x >> p.lanes_log2; base < heads; base += kUnroll * groups) {
    Raw raw[kUnroll];
    float scale[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t item = base + u * groups;
      raw[u] = Raw{};
      scale[u] = 1.0f;
      if (item >= heads) continue;
      uint32_t head;
      const Slot at = places[p.heads(item, head)];
      if (at.block < 0) continue;
      const CachedHead from = cached_head(p, s, at, head);
      raw[u] = *reinterpret_cast<const Raw*>(from.row + byte);
      scale[u] = from.scale;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t item = base + u * groups;
      if (item >= heads) continue;
      uint32_t head;
      const int64_t t = first + p.heads(item, head);
      uint4 pack;
      if constexpr (kCodes) {
        float x[kSize];
#pragma unroll
        for (int w = 0; w < kWords; ++w)
          decode(raw[u].word[w], p.cache_dtype == DType::f8e4m3, p.soft, x + 4 * w);
#pragma unroll
        for (int j = 0; j < kSize; ++j) x[j] = __fmul_rn(x[j], scale[u]);
        pack = pack_of<T>(x);
      } else {
        static_assert(sizeof(Raw) == sizeof(uint4), "the bytes of the output");
        pack = reinterpret_cast<const uint4&>(raw[u]);
      }
      T* row = reinterpret_cast<T*>(s.tokens) + t * s.token_stride + head * s.token_head_stride;
      store_pack(row, i, p.dim, true, pack);
    }
  }
}

// Whatever is not aligned, and conversions between float types: element by element.
template <class T>
__device__ __forceinline__ void gather_elements(const GatherParams& p, const Slot* places,
                                                int64_t first, uint32_t heads, int64_t begin,
                                                int64_t end) {
  const GatherSide& s = p.side[blockIdx.y];
#pragma unroll 1
  for (uint32_t item = threadIdx.x >> p.lanes_log2; item < heads;
       item += kThreads >> p.lanes_log2) {
    uint32_t head;
    const uint32_t token = p.heads(item, head);
    const Slot at = places[token];
    T* row = reinterpret_cast<T*>(s.tokens) + (first + token) * s.token_stride +
             head * s.token_head_stride;
    const CachedHead from = at.block < 0 ? CachedHead{} : cached_head(p, s, at, head);
#pragma unroll 2
    for (int64_t i = begin; i < end; ++i) {
      if (at.block < 0) {
        row[i] = T{};
      } else if (p.same_type) {
        row[i] = reinterpret_cast<const T*>(from.row)[i];
      } else {
        row[i] =
            from_float<T>(__fmul_rn(cached_value(from.row, i, p.cache_dtype, p.soft), from.scale));
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) gather_kernel(const __grid_constant__ GatherParams p) {
  constexpr int kSize = Pack<T>::kSize;
  __shared__ Slot places[kMaxTokens];
  grid_wait();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.tokens_per_cta;
  const int64_t left = p.num_tokens - first;
  const uint32_t count = static_cast<uint32_t>(left < p.tokens_per_cta ? left : p.tokens_per_cta);
  for (uint32_t t = threadIdx.x / 32; t < count; t += kThreads / 32) {
    const Slot at = find_token(p, first + t);
    if (threadIdx.x % 32 == 0) places[t] = at;
  }
  __syncthreads();
  const uint32_t heads = count * p.heads.value;
  const uint32_t lanes = 1u << p.lanes_log2, lane = threadIdx.x & (lanes - 1);
  for (int64_t i = lane * kSize; i < p.dim; i += lanes * kSize) {
    if (p.packs && p.same_type) {
      gather_packs<T, false>(p, places, first, heads, i);
    } else if (p.packs) {
      gather_packs<T, true>(p, places, first, heads, i);
    } else {
      gather_elements<T>(p, places, first, heads, i, i + kSize < p.dim ? i + kSize : p.dim);
    }
  }
}

template <class T>
int gather(const cpu::CacheGatherParams& p, int64_t tokens, void* stream) {
  constexpr int kSize = Pack<T>::kSize;
  const cpu::CacheSide* sides[2] = {&p.key, &p.value};
  GatherParams g{};
  const int64_t cache_size = dtype_size(p.cache_dtype);
  const int64_t pack_bytes = kSize * cache_size;
  g.same_type = p.cache_dtype == p.token_dtype;
  g.packs = g.same_type || cache_size == 1;
  for (int i = 0; i < 2; ++i) {
    const cpu::CacheSide& s = *sides[i];
    g.packs = g.packs && reinterpret_cast<uintptr_t>(s.cache) % pack_bytes == 0 &&
              packs_fit(s.tokens, p.dim, sizeof(T), {s.token_stride, s.token_head_stride});
    for (const int64_t stride : {s.block_stride, s.position_stride, s.head_stride})
      g.packs = g.packs && stride * cache_size % pack_bytes == 0;
    g.side[i] = {static_cast<char*>(s.tokens),
                 static_cast<char*>(s.cache),
                 s.token_stride,
                 s.token_head_stride,
                 s.block_stride,
                 s.position_stride,
                 s.head_stride,
                 s.scale};
  }
  g.cu_seqlens = Indices(p.cu_seqlens, p.cu_dtype, p.cu_stride);
  g.has_starts = p.seq_starts != nullptr;
  if (g.has_starts) g.seq_starts = Indices(p.seq_starts, p.starts_dtype, p.starts_stride);
  g.block_table = p.block_table, g.table_dtype = p.table_dtype;
  g.row_stride = p.table_row_stride, g.col_stride = p.table_col_stride;
  g.num_tokens = tokens, g.batch = p.batch, g.block_size = p.block_size, g.dim = p.dim;
  g.cache_dtype = p.cache_dtype;
  g.soft = force_portable();
  const int lanes = lanes_of_head(ceil_div(p.dim, kSize));
  while (1 << g.lanes_log2 < lanes) ++g.lanes_log2;
  g.heads = Divisor(p.heads);
  const int64_t most = kThreads * kUnroll / (p.heads * lanes);
  const int64_t spread = tokens / (2 * device_facts().sms);
  int64_t per_cta = most < spread ? most : spread;
  per_cta = per_cta < kMaxTokens ? per_cta : kMaxTokens;
  g.tokens_per_cta = static_cast<int32_t>(per_cta > 1 ? per_cta : 1);
  const dim3 grid(static_cast<unsigned>(ceil_div(tokens, g.tokens_per_cta)), 2);
  return launch(gather_kernel<T>, grid, kThreads, 0, stream, g);
}

}  // namespace

int launch_gather_cache(const cpu::CacheGatherParams& p, int64_t tokens, void* stream) {
  return with_float(p.token_dtype, [&](auto t) { return gather<decltype(t)>(p, tokens, stream); });
}

}  // namespace fastinfer::cuda
