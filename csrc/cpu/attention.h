// CPU attention, one core for flash_attn_fwd, flash_attn_varlen_fwd and flash_attn_kvcache.
//
//   s_ij = scale * q_i . k_j      softcap, ALiBi, masks, then      o_i = sum_j softmax(s_i)_j v_j
//
// Rows. The query heads that share a key head are packed with the tokens: row r of (sequence, key
// head) is token r / group, head kv_head * group + r % group. A work item owns up to kMaxRows rows.
// Keys. Position 0 .. len_k - 1 of a sequence. Tiles of kTile and chunks of kChunk keys start at
// absolute positions, whatever the item, batch, page size or thread count: a row's bits depend on
// its own query and keys only. Items may cover any whole chunks; each chunk is an online softmax of
// its own and chunks are merged in order.
// Memory. Key j lies at pages[j / page_size] * page + (j % page_size) * token + head, dense and
// packed keys being one endless page. Only keys visible to some row of the item are touched.
#pragma once

#include "dtype.h"
#include "isa.h"

namespace fastinfer::cpu {

constexpr int kTile = 64;     // keys per tile, also the unit of decode plans
constexpr int kChunk = 1024;  // keys per independent softmax
constexpr int kMaxRows = 96;
constexpr int kMaxHeadDim = 256;

// K or V. Strides and offsets in elements; the last dimension is contiguous.
struct KeyValue {
  const void* data;
  const float* scale;  // of 8-bit codes, else nullptr
  int64_t page, token, head;
  bool scale_per_token;  // else one value per head, `scale_head` apart (0: one for all)
  int64_t scale_page, scale_token, scale_head;
};

struct RotaryTable {
  const void* cos;  // [max_position, dim / 2]; nullptr: none
  const void* sin;
  DType dtype;
  int64_t cos_stride, sin_stride, dim;
  bool interleaved;
};

struct AttentionSequence {
  int64_t q, out, lse;  // offsets of the first query row, elements
  int64_t k, v;         // offsets of key 0 (dense, packed)
  int64_t k_scale, v_scale;
  int64_t batch;         // row of alibi
  int64_t len_q, len_k;  // masks align the last query with the last key
  int64_t first_key;     // keys before it do not exist (left padding)
  int64_t rotary_position;
  const int32_t* pages;  // nullptr: dense
};

struct AttentionItem {
  int32_t sequence, kv_head;
  int64_t row, rows;
  int64_t key_begin, key_end;  // whole chunks, except at the ends
  int64_t partial;             // >= 0: offset into partials instead of out
};

struct AttentionParams {
  const void* q;
  void* out;
  float* lse;  // may be nullptr
  KeyValue k, v;
  DType dtype, kv_dtype;
  int64_t q_token, q_head, out_token, out_head, lse_token, lse_head;
  int64_t heads_q, heads_kv, group, head_dim, page_size;
  int64_t window_left, window_right;  // -1: unlimited
  float scale, softcap;
  const float* alibi;
  int64_t alibi_batch, alibi_head;
  const void* sinks;
  DType sinks_dtype;
  int64_t sinks_stride;
  RotaryTable rotary;
  bool rotary_per_token;  // query token i at rotary_position + i, else all at rotary_position
  const AttentionSequence* sequences;
  const AttentionItem* items;
  float* partials;  // per item: rows x (max, sum), then rows x padded head_dim
};

constexpr int64_t padded_dim(int64_t d) { return (d + 15) / 16 * 16; }

// One row range split over several chunks: items[first] .. items[first + count - 1], in key order.
struct AttentionMerge {
  int64_t first, count;
};

// New tokens written into a cache; row r is token r % tokens of sequence r / tokens.
struct AppendParams {
  const void* k;
  const void* v;
  int64_t k_batch, k_token, k_head, v_batch, v_token, v_head;
  void* k_cache;
  void* v_cache;
  float* k_scale;
  float* v_scale;
  KeyValue k_layout, v_layout;  // strides of the caches and their scales
  DType dtype, cache_dtype;
  int64_t tokens, heads_kv, head_dim, page_size;
  RotaryTable rotary;
  const AttentionSequence* sequences;  // k, v, k_scale, v_scale, pages as for reading
  const int64_t* first_position;       // [B], where token 0 goes
};

struct MergeStatesParams {
  const void* prefix;
  const void* suffix;
  const float* prefix_lse;
  const float* suffix_lse;
  void* out;
  float* out_lse;  // may be nullptr
  DType dtype;
  int64_t batch, tokens, heads, head_dim;
  // strides of [batch, token, head] for prefix, suffix, out, and of their lse
  int64_t prefix_stride[3], suffix_stride[3], out_stride[3];
  int64_t prefix_lse_stride[3], suffix_lse_stride[3], out_lse_stride[3];
};

}  // namespace fastinfer::cpu

FI_DECLARE_KERNEL(attention, const AttentionParams& p, int64_t item)
FI_DECLARE_KERNEL(attention_merge, const AttentionParams& p, const AttentionMerge& merge)
FI_DECLARE_KERNEL(attention_append, const AppendParams& p, int64_t begin, int64_t end)
FI_DECLARE_KERNEL(merge_attn_states, const MergeStatesParams& p, int64_t begin, int64_t end)
