// Which kernel serves a call: pure host code. Lengths and batch only choose between tiles that give
// the same bits.
#pragma once

#include "flash_attention.h"

namespace fastinfer::cuda::flash {

enum class Kernel {
  portable,      // 16-bit rows in 16-byte pieces
  portable_any,  // 8-bit codes, odd alignment
  sm90,          // TMA and wgmma
};

// Head dimension of the instance that serves head_dim. `modify` (see flash_instances.h) has none
// of 192.
constexpr int sm90_dim(int head_dim) { return (head_dim + 63) / 64 * 64; }
constexpr int sm90_modify_dim(int head_dim) {
  return sm90_dim(head_dim) == 192 ? 256 : sm90_dim(head_dim);
}
constexpr int portable_dim(int head_dim) {
  return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
}
// Keys per tile of the sm_90a kernel: what fits shared memory twice, in steps of 16.
constexpr int sm90_keys(int dim) { return dim <= 128 ? 128 : dim <= 192 ? 96 : 80; }

// Tiles of 64 query rows of a call; of packed sequences, at most.
inline int64_t tiles_of_64(const FlashAttentionParams& p) {
  const int64_t tiles =
      p.cu_q ? (p.tokens_q + 63 * int64_t{p.batch}) / 64 : (p.len_q + 63) / 64 * int64_t{p.batch};
  return tiles * p.heads_q;
}
// Tiles of 64 rows, two CTAs per SM, instead of 128 rows: where all of them run at once and there
// are few keys. The same bits.
constexpr bool short_tiles(int64_t tiles, int64_t len_k, int64_t sms) {
  return tiles <= 2 * sms && len_k <= 512;
}
static_assert(short_tiles(256, 512, 132) && !short_tiles(512, 512, 132) &&
                  !short_tiles(256, 1024, 132),
              "1x512 with 32 heads");
// The portable kernel at 64 columns: 64 rows per CTA in small grids. The same bits.
constexpr bool portable_short_tiles(int64_t tiles, int64_t sms) { return tiles <= 8 * sms; }

// Rows of the TMA boxes that both tiles and pages consist of; 8 rows are the unit of the swizzle.
constexpr int box_rows(int page_size, int keys) {
  return page_size == 0 ? keys : box_rows(keys % page_size, page_size);
}
constexpr bool page_suits_tma(int page_size, int keys) {
  return box_rows(page_size, keys) % 8 == 0;
}

// Strides TMA can step along: positive multiples of 16 bytes below 2^40, or never used.
inline bool stride_suits_tma(int64_t stride, int64_t size) {
  return size <= 1 || (stride > 0 && stride % 8 == 0 && stride < int64_t{1} << 39);
}

inline Kernel choose_kernel(const FlashAttentionParams& p, int compute_capability,
                            bool force_portable) {
  if (dtype_size(p.kv_dtype) == 1 || !aligned16(p.q, {p.q_batch, p.q_token, p.q_head}) ||
      !aligned16(p.k.data, {p.k.page, p.k.token, p.k.head}) ||
      !aligned16(p.v.data, {p.v.page, p.v.token, p.v.head}))
    return Kernel::portable_any;
  if (compute_capability != 90 || force_portable) return Kernel::portable;
  const int64_t rows = p.table ? p.page_size : p.cu_q ? p.tokens_k : p.len_k;
  const int64_t outer = p.table ? p.num_pages : p.cu_q ? 1 : p.batch;
  bool suits = rows > 0 && outer > 0 && p.k.data && p.v.data && stride_suits_tma(p.q_token, 2) &&
               stride_suits_tma(p.q_head, p.heads_q) &&
               stride_suits_tma(p.q_batch, p.cu_q ? 1 : p.batch);
  for (const cpu::KeyValue* t : {&p.k, &p.v})
    suits = suits && stride_suits_tma(t->token, rows) && stride_suits_tma(t->head, p.heads_kv) &&
            stride_suits_tma(t->page, outer);
  if (p.table) suits = suits && page_suits_tma(p.page_size, sm90_keys(sm90_dim(p.head_dim)));
  return suits ? Kernel::sm90 : Kernel::portable;
}

// Query heads of a dense batch whose tiles are dealt out together: as many as have keys and values
// that fit 35 % of the L2 cache, and where there are more than 8 tiles per SM no more than give
// each SM 4, in sections of nearly the same size. Many short sequences (up to 4 tiles of rows per
// head, more than 16 per SM): multiples of 12 heads, with which the CTAs that get a tile more than
// the others get shorter ones under a causal mask (32x512 in a model of 132 SMs: 1.01 of an even
// share, with 4, 8 or 128 heads 1.03). The order of the work only.
constexpr int64_t section_heads(int64_t batch, int64_t heads_kv, int64_t group, int64_t len_q,
                                int64_t len_k, int64_t head_dim, int64_t l2_bytes, int64_t sms) {
  const int64_t all = batch * heads_kv, bytes = 4 * len_k * head_dim;
  const int64_t tiles = (len_q + 127) / 128 * group;  // of a key head
  int64_t fit = bytes > 0 ? l2_bytes * 35 / 100 / bytes : all;
  if (len_q <= 512 && all * tiles > 16 * sms) {
    int64_t heads = group;
    while (heads % 12 != 0) heads += group;
    if (heads <= fit * group) return heads;
  }
  if (all * tiles > 8 * sms && fit > 4 * sms / tiles) fit = 4 * sms / tiles;
  const int64_t sections = fit >= all ? 1 : fit > 0 ? (all + fit - 1) / fit : all;
  return (all + sections - 1) / sections * group;
}
static_assert(section_heads(1, 8, 4, 8192, 8192, 128, 50 << 20, 132) == 8, "512 tiles");
static_assert(section_heads(1, 32, 1, 8192, 8192, 128, 50 << 20, 132) == 4, "16 MiB of keys");
static_assert(section_heads(1, 8, 4, 131072, 131072, 128, 50 << 20, 132) == 4, "none fits");
static_assert(section_heads(32, 8, 4, 512, 512, 128, 50 << 20, 132) == 12 &&
                  section_heads(32, 8, 8, 512, 512, 128, 50 << 20, 132) == 24 &&
                  section_heads(32, 32, 1, 512, 512, 64, 50 << 20, 132) == 12,
              "many short sequences");
static_assert(section_heads(32, 8, 4, 1024, 1024, 128, 50 << 20, 132) == 64, "512 tiles");
static_assert(section_heads(1, 8, 4, 2048, 2048, 128, 50 << 20, 132) == 32, "few: one section");
static_assert(section_heads(2, 4, 2, 64, 0, 128, 50 << 20, 132) == 16, "no keys at all");

static_assert(sm90_dim(16) == 64 && sm90_dim(72) == 128 && sm90_dim(128) == 128 &&
                  sm90_dim(136) == 192 && sm90_dim(256) == 256,
              "the next multiple of 64");
static_assert(box_rows(16, 128) == 16 && box_rows(64, 128) == 64 && box_rows(256, 128) == 128 &&
                  sm90_modify_dim(192) == 256 && box_rows(64, 80) == 16 && box_rows(80, 80) == 80 &&
                  box_rows(24, 96) == 24 && page_suits_tma(8, 80) && !page_suits_tma(4, 128) &&
                  !page_suits_tma(20, 80),
              "whole boxes per tile and per page");

}  // namespace fastinfer::cuda::flash
