// CPU kernels of csrc/ops/kv_cache.cpp (and of the cache write in csrc/ops/rotary.cpp). All strides
// are in elements.
#pragma once

#include "dtype.h"
#include "isa.h"

namespace fastinfer::cpu {

// Scale of element (block, position, head) = data[block * .. + position * .. + head * ..]: a scalar
// has three strides of 0, a per-head scale only the last. `dynamic` scales are written by the cache
// write, one per token and head. data == nullptr: a float cache.
struct ScaleView {
  float* data;
  int64_t block, position, head;
  bool dynamic;
};

// A cache [num_blocks, P, Hkv, D] and the packed tokens [T, Hkv, D] that are written to or read
// from it.
struct CacheSide {
  void* tokens;
  int64_t token_stride, token_head_stride;
  void* cache;
  int64_t block_stride, position_stride, head_stride;
  ScaleView scale;
};

// Token t goes to slot slots[t] = block * block_size + position; a negative slot is skipped.
struct CacheWriteParams {
  CacheSide key, value;
  const void* slots;
  int64_t slot_stride;
  DType slot_dtype, token_dtype, cache_dtype;
  int64_t block_size, heads, dim;
};

// Token t of sequence b (cu_seqlens[b] <= t < cu_seqlens[b + 1]) comes from position
// seq_starts[b] + t - cu_seqlens[b] of that sequence; tokens from cu_seqlens[batch] on are zeroed.
struct CacheGatherParams {
  CacheSide key, value;
  const void *block_table, *cu_seqlens, *seq_starts;  // seq_starts may be nullptr: 0
  int64_t table_row_stride, table_col_stride, cu_stride, starts_stride;
  DType table_dtype, cu_dtype, starts_dtype, token_dtype, cache_dtype;
  int64_t batch, block_size, heads, dim;
};

}  // namespace fastinfer::cpu

// Ranges of tokens.
FI_DECLARE_KERNEL(write_cache, const CacheWriteParams& p, int64_t begin, int64_t end)
FI_DECLARE_KERNEL(gather_cache, const CacheGatherParams& p, int64_t begin, int64_t end)
