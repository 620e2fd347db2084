// Attention of many query tokens on the GPU: launchers and their parameters.
//
//   s_ij = scale * q_i . k_j      softcap, ALiBi, masks, then      o_i = sum_j softmax(s_i)_j v_j
//
// Two kernel families with the same semantics: flash_sm90.cuh (TMA, wgmma; sm_90a) for 16-bit keys
// whose addresses suit TMA, flash_portable.cuh (cp.async, mma.sync; sm_80 and newer) for the rest,
// 8-bit codes among them. Key tiles start at absolute positions of a sequence and are visited in
// one order, each row on its own: a row's bits depend on its query, its keys and the kernel only,
// not on its batch, on chunking or on pages.
#pragma once

#include <initializer_list>

#include "../../cpu/attention.h"

namespace fastinfer::cuda {

// Strides in elements. Dense: batch b of q, out, k, v at b * (q_batch, out_batch, k.page, v.page).
// Packed: sequence b at row cu_q[b] (cu_k[b]). Paged: key j at table[b][j / page_size] * k.page +
// (j % page_size) * k.token.
struct FlashAttentionParams {
  const void* q;
  void* out;
  float* lse;  // may be nullptr
  cpu::KeyValue k, v;
  DType dtype, kv_dtype;
  int64_t q_batch, q_token, q_head, out_batch, out_token, out_head;
  int64_t lse_batch, lse_token, lse_head;
  int32_t batch, heads_q, heads_kv, group, head_dim;
  int32_t len_q, len_k;        // dense: of every sequence; packed: bounds for every sequence
  int64_t tokens_q, tokens_k;  // rows of packed tensors
  const int32_t* cu_q;         // nullptr: dense
  const int32_t* cu_k;
  const int32_t* used_k;
  const int32_t* table;  // nullptr: not paged
  int64_t cu_q_stride, cu_k_stride, used_k_stride, table_stride;
  int32_t page_size;
  int32_t page_shift;  // log2(page_size), -1 when it is no power of two
  int32_t box_rows;    // set by the sm_90a launcher: rows that are loaded together
  int64_t num_pages;
  int32_t window_left, window_right;  // -1: unlimited
  int32_t section;  // dense: query heads (of all batches) whose tiles are done together
  float scale, softcap;
  float inner, outer;  // set by the launcher: scores become inner * s, or outer * tanh(inner * s)
  const float* alibi;
  int64_t alibi_batch, alibi_head;
  const void* sinks;
  DType sinks_dtype;
  int64_t sinks_stride;
};

// Positions are 32-bit; a window this far is none.
constexpr int64_t kMaxKeys = int64_t{1} << 30;
// Tiles of query rows of one call are numbered in 32 bits.
constexpr int64_t kMaxTiles = INT32_MAX;

// May 16-bit rows at `data` plus multiples of the strides be moved 16 bytes at a time?
inline bool aligned16(const void* data, std::initializer_list<int64_t> strides) {
  bool fits = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int64_t s : strides) fits = fits && s % 8 == 0;
  return fits;
}

int launch_flash_attention(const FlashAttentionParams& p, void* stream);

}  // namespace fastinfer::cuda
