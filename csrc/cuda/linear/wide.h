// Launcher of the many-token path of int4_linear and int8_linear (sm_90a; wide_sm90.cuh).
#pragma once

#include "packed_linear.h"

namespace fastinfer::cuda {

// Instance of the kernel: tiles of `tokens` x up to 64 * blocks * groups weight rows, `blocks` of
// 64 rows for each of `groups` warpgroups. tile_blocks: how many a tile really has, all or (4 bit,
// up to 32 tokens, where such an instance exists) one less. With split > 1 the tiles beyond whole
// rounds over the multiprocessors (all of them, if they are few) are given to clusters of `split`
// CTAs that cut K.
struct WideShape {
  int tokens, blocks, groups, tile_blocks, split;
};

// p.perm must be null and x 16-byte aligned with a row stride that is a multiple of 8: see
// gather_columns. k > 0; group_columns a multiple of 64, or 32, or at least k; zeros null or u8.
int wide_linear(const PackedLinear& p, WideShape shape, void* stream);

// to[i, c] = x[i, perm[c]] (perm null: x[i, c]) for c < k, 16-bit elements; `to` has a row stride
// of `to_stride`.
int gather_columns(const void* x, int64_t x_stride, int64_t m, int64_t k, const int32_t* perm,
                   void* to, int64_t to_stride, void* stream);

}  // namespace fastinfer::cuda
