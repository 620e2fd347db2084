// Between the checks of flash_attn_kvcache and its CUDA kernels.
#pragma once

#include "attention.h"

namespace fastinfer::paged_attention {

constexpr int64_t kPlanHeader = 8, kPlanVersion = 1;

// Work of one sequence and key head, in tiles of the keys that some query sees.
int64_t decode_cost(int64_t len, int64_t len_q, int64_t window_left);

// The tensors of a call, checked.
struct Tensors {
  const Tensor& q;
  const Tensor& k_cache;
  const OptTensor& k;
  const OptTensor& v;
  const Tensor& out;
  const OptTensor& lse;
  const OptTensor& rotary_cos;
  const OptTensor& rotary_sin;
  const OptTensor& cache_seqlens;
  const OptTensor& cache_batch_idx;
  const OptTensor& cache_leftpad;
  const OptTensor& block_table;
  const OptTensor& k_scale;
  const OptTensor& v_scale;
  const OptTensor& plan;
  const OptTensor& workspace;
};

// Appends and attends on the device of q. `capacity`: keys a sequence can have.
void run_cuda(const attention::Call& call, const Tensors& t, int64_t capacity,
              bool batch_invariant);

// How the packed query rows of (sequence, key head) are dealt to CTAs: 16 * row_tiles in a block.
struct RowBlocks {
  int64_t row_tiles, blocks;
};
RowBlocks choose_row_blocks(int64_t rows, int64_t pairs, int64_t capacity, bool plain_pairs,
                            bool several, bool batch_invariant);

// A large CTA per SM?
bool choose_large(int64_t batch, int64_t heads, int64_t capacity);

// Lists among which (key head, row block) pairs are dealt, each served by ctas / lanes CTAs.
int64_t choose_lanes(int64_t pairs, int64_t ctas);

// CTAs of a cluster, clusters that an item can have, and for which shares (see params.h).
struct Clusters {
  int64_t size, parts, least_share, most_share;
};
Clusters choose_clusters(int64_t batch, int64_t heads, int64_t row_blocks, int64_t capacity,
                         bool eight_bit, int64_t slots);

}  // namespace fastinfer::paged_attention
