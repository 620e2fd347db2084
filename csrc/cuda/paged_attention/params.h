// What the decode kernel needs to know, and the shape of its workspace. Plain C++.
//
// Rows. The group = Hq / Hkv query heads of a key head and the q_len tokens are packed: row r of
// (sequence, key head) is token r / group, head kv_head * group + r % group. A CTA works on a block
// of 16 * row_tiles of them.
//
// Work. The (key head, row block) pairs are dealt round robin to `lanes`; lane j's list runs over
// the sequences and, within one, over the lane's pairs. An item, (b, pair), costs max(1, tiles of
// 64 visible keys). CTA (lane, g) works on cost [g * share, (g + 1) * share) of its lane's list,
// share = ceil(total / CTAs per lane): neighbouring CTAs read neighbouring heads of the same keys
// at the same time. An item cut by such borders is summed up from partial results once the last
// of them is there (finish.cuh). Short shares end with their item (work.cuh). Batch-invariant: an
// item is in pieces of 1024 keys at absolute positions, each belongs to the CTA of its first tile.
//
// Clusters (sm_90). Few items have clusters of CTAs to themselves: 1 << parts_shift of them at
// most, fewer where the sequence is short, each CTA with an equal part of the keys
// (cluster_finish.cuh).
#pragma once

#include <cstdint>

#include "../../cpu/dtype.h"

namespace fastinfer::cuda {

constexpr int kPlanTile = 64;        // keys per unit of cost
constexpr int kInvariantTiles = 16;  // tiles of a fixed piece
constexpr int kShortShare = 12;      // tiles, up to which a share is of one item (work.cuh)
constexpr int kLongShare = 32;       // tiles, from which on ends of items count (work.cuh)
constexpr int kPartShift = 2;        // log2 of the tiles per CTA before an item has more clusters
constexpr int kAlways = INT32_MAX;   // most_share of a launch that is nothing but clusters
constexpr int kPlanHeader = 8;       // see csrc/ops/paged_attention.cpp

// Kernels read this from constant memory, where every line of 64 bytes that is not there yet takes
// time: what most calls need comes first, in the order in which it is needed.
struct DecodeParams {
  const int32_t* lengths;  // [B], nullptr: `capacity` each
  const int32_t* plan;     // may be nullptr
  const int32_t* table;    // nullptr: dense
  const void* q;           // 4-byte aligned, as are its strides
  int64_t lengths_stride, table_stride;
  int32_t batch, capacity, append;
  int32_t q_bytes;            // of a contiguous q; 0: not contiguous, or large
  int32_t entries;            // of a contiguous table, aligned to 16 bytes; else INT32_MAX
  int32_t lanes, lane_items;  // lane_items = heads_kv * row_blocks / lanes
  int32_t min_share;
  int32_t item_cost;  // in tiles, on top of the keys, where shares are long and lengths differ
  // log2 of the CTAs of a cluster (0: none) and of the clusters that an item can have; where equal
  // shares of all CTAs would have fewer or more tiles than this, those are taken instead.
  int32_t cluster_shift, parts_shift, least_share, most_share;
  int32_t columns;                // of the table
  int32_t page_size, page_shift;  // page_shift: -1 where page_size is not a power of two
  int32_t rows, row_blocks, group, dim, heads_kv;
  const void* k;
  const void* v;
  uint32_t page16, token16, head16;  // strides of K and V in 16-byte units, where `packs`
  float scale;
  int64_t q_batch, q_head;
  DType q_dtype, kv_dtype, sinks_dtype;
  bool query_packs;  // q may be read 16 bytes at a time
  bool query_early;  // and right away: nothing in front of this launch still runs
  bool packs;        // K and V rows: same strides, 16-byte aligned, less than 64 GiB apart
  bool out_packs;    // out may be written 8 bytes at a time
  bool scale_per_token_k, scale_per_token_v;
  bool invariant;
  bool large;         // one CTA of 8 warps per SM, where there is such a kernel
  int32_t* counters;  // zero before and after every launch
  int32_t* claims;    // as many
  float* partial;     // [piece][block rows][D]
  float* partial_ml;  // [piece][block rows][2]: max in the log2 domain, sum
  void* out;
  float* lse;  // may be nullptr
  int64_t out_batch, out_head;
  const float* k_scale;  // of 8-bit codes
  const float* v_scale;
  int64_t ks_head, vs_head;
  int32_t q_len, row_tiles, row_shift;  // row_tiles = 1 << row_shift
  int32_t window_left, window_right;    // -1: unlimited
  int32_t max_pieces;                   // per item, batch-invariant mode
  float softcap;
  const int32_t* cache_rows;
  const int32_t* leftpad;
  const float* alibi;
  const void* sinks;
  int64_t q_token, out_token, lse_batch, lse_token, lse_head;
  int64_t k_page, k_token, k_head, v_page, v_token, v_head;  // elements
  int64_t ks_page, ks_token, vs_page, vs_token;
  int64_t cache_rows_stride, leftpad_stride, alibi_batch, alibi_head, sinks_stride;
  int64_t pages, page_rows;  // shape of the caches
  static constexpr bool kPlain = false, kClusters = false;
  static constexpr int kRowsAtOnce = 1;  // that a thread merges
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
};

// What most calls have in common, known when the kernel is compiled; see is_plain().
template <int kRowTiles, bool kScalePerToken = false, int kNumWarps = 4>
struct PlainParams : DecodeParams {
  static constexpr int kWarps = kNumWarps, kThreads = 32 * kWarps;
  static constexpr const int32_t* cache_rows = nullptr;
  static constexpr const int32_t* leftpad = nullptr;
  static constexpr const float* alibi = nullptr;
  static constexpr const void* sinks = nullptr;
  static constexpr int32_t q_len = 1, row_tiles = kRowTiles, row_shift = kRowTiles / 2;
  static constexpr int32_t window_left = -1, window_right = -1;
  static constexpr float softcap = 0.0f;
  static constexpr bool kPlain = true, kClusters = kRowTiles == 1;
  static constexpr int kRowsAtOnce = kRowTiles == 1 ? 1 : 4;
  static constexpr bool packs = true, out_packs = true, invariant = false;
  static constexpr bool scale_per_token_k = kScalePerToken, scale_per_token_v = kScalePerToken;
};

// One query per sequence and none of the features that PlainParams fixes; scales of 8-bit codes all
// per token or none.
inline bool is_plain(const DecodeParams& p) {
  return !p.leftpad && !p.cache_rows && !p.alibi && !p.sinks && p.softcap == 0.0f &&
         p.window_left < 0 && p.q_len == 1 && p.packs && p.out_packs && !p.invariant &&
         p.scale_per_token_k == p.scale_per_token_v;
}

// New keys and values into the cache, and q rotated, before the decode kernel runs.
struct AppendParams {
  const void* k;
  const void* v;
  void* k_cache;
  void* v_cache;
  float* k_scale;
  float* v_scale;
  const void* q;    // copied to q_out, rotated when the tables are given
  void* q_out;      // [B, Sq, Hq, D] contiguous, or nullptr
  const void* cos;  // [positions, rotary_dim / 2]
  const void* sin;
  const int32_t* lengths;
  const int32_t* cache_rows;
  const int32_t* table;
  int64_t k_batch, k_token, k_head, v_batch, v_token, v_head, q_batch, q_token, q_head;
  int64_t kc_page, kc_token, kc_head, vc_page, vc_token, vc_head;
  int64_t ks_page, ks_token, ks_head, vs_page, vs_token, vs_head;
  int64_t cos_stride, sin_stride, lengths_stride, cache_rows_stride, table_stride;
  int32_t batch, tokens, heads_kv, dim, page_size, q_len, heads_q, rotary_dim;
  bool interleaved, q_per_token;
  bool k_scale_per_token, v_scale_per_token;
  bool soft;  // e4m3 encoded as sm_80 must
  DType dtype, cache_dtype, rotary_dtype;
};

}  // namespace fastinfer::cuda
