// Y[M, N] = X[M, K] W[N, K]^T + bias for few tokens: the weights pass once, at memory speed.
//
// Tensor cores compute Y^T = W X^T, so that a tile of 8 tokens wastes little. Weights are A in
// registers: packed words are already in the order of its fragments (linear_layout.h); rows of a
// 16-bit W are read in 16-byte pieces, which is the order of fragments of another, equally good
// numbering of the columns. X is B: staged once per CTA in shared memory, row by row.
//
// Rows of W are dealt in tiles of two strips of 16 (16-bit W: one) to teams of CTAs; a team is one
// CTA, or where x does not fit a cluster of 2, 4 or 8 `ranks` that share the columns. The 16 warps
// of a CTA split the columns of a tile: each takes every 16th pair of 64-column blocks. Every warp
// streams its blocks through a private ring of cp.async stages, across tiles, without a barrier;
// codes become exact 16-bit integers, sums over one group are scaled in fp32. At the end of a tile
// the warps are added in order, then the ranks: their sums are exchanged through shared memory of
// the cluster while the next tile already runs (without clusters: through memory, the last CTA adds
// up). The order of every sum is fixed by K and the number of ranks.
//
// Issue slots are what runs out first: 11 instructions turn 8 codes into bf16, so everything else
// is kept out of the loop (running pointers, one scale for two blocks).
//
// Weights are read before grid_wait(): they are older than the launch (launch.cuh).
#pragma once

#include <type_traits>

#include "../common/launch.cuh"
#include "skinny_product.cuh"
#include "skinny_result.cuh"
#include "skinny_stream.cuh"

namespace fastinfer::cuda {

template <bool kBf16, int kBits, int kTiles, int kStrips, bool kGeneric, int kStages, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 16 / kWarps)
    skinny_kernel(const __grid_constant__ SkinnyParams p) {
  using E = std::conditional_t<kBf16, __nv_bfloat16, __half>;
  constexpr int kRows = 16 * kStrips, kThreads = 32 * kWarps;
  static_assert(kBits != 16 || !kGeneric, "groups are for packed weights");
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const SkinnyShare<kStrips, kWarps> share(p, warp);
  const int length = share.length, column_part = share.column_part,
            column_parts = share.column_parts;
  const SkinnyShared at = skinny_shared(p.m, p.x_pitch, kWarps, kStages, p.slot_bytes, kRows,
                                        kTiles, p.ranks > 1 ? kRows << p.row_shift : 0);
  const uint32_t base = shared_address(shared);
  // Slots of this warp; addresses are those of this lane's first 16 bytes.
  const uint32_t ring = base + at.ring + warp * p.slot_bytes + lane * 16;
  const uint32_t slot_step = kWarps * p.slot_bytes;
  const uint32_t ring_end = ring + kStages * slot_step;

  grid_launch_dependents();

  SkinnyStream<kBits, kStrips, kGeneric, kWarps> stream(p, share, lane);
  // x first: its loads would wait behind those of the weights. Under programmatic launch the
  // weights first, as they may be read while the kernel in front still writes x.
  const auto stage = [&] {
    grid_wait();
    stage_x<kThreads>(p, reinterpret_cast<E*>(shared + at.x), share.first * 64,
                      (length + 1) / 2 * 128);
    cp_async_commit();
  };
  if (!p.weights_first) stage();
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) stream.load(i & 1, ring + i * slot_step);
  if (threadIdx.x < kSkinnyZeroBytes / 16)
    reinterpret_cast<uint4*>(shared)[threadIdx.x] = make_uint4(0, 0, 0, 0);
  if (p.weights_first) {
    stage();
    cp_async_wait<0>();
  } else {
    cp_async_wait<kStages - 1>();
  }
  __syncthreads();

  // Where this lane reads fragments of x: a row of ldmatrix, or its own 16 bytes. Absent tokens
  // read zeros.
  uint32_t x_base[kTiles], x_step[kTiles];  // step: from a pair of this warp to its next
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int token = 8 * i + (kBits == 16 ? lane / 4 : lane % 8);
    const int piece = kBits == 16 ? lane % 4 : lane / 8;
    const bool there = token < p.m;
    x_base[i] = base + piece * 16 + (there ? at.x + token * p.x_pitch * 2 + column_part * 256 : 0);
    x_step[i] = there ? column_parts * 256 : 0;
    keep(x_base[i]), keep(x_step[i]);
  }

  SkinnyProduct<kBf16, kBits, kTiles, kStrips, kGeneric> product(p, lane);
  SkinnyResult<E, kTiles, kStrips, kWarps> result{p, shared, at, share.rank, column_parts};
  uint32_t slot = ring, previous = ring_end - slot_step;
  for (int round = 0;; ++round) {
    const SkinnyTile tile = skinny_tile(p.deal, p.teams, share.team, round);
    if (tile.count == 0) break;
    const int columns_end = tile.count > share.row_part * kStrips ? length : 0;
    product.start_tile(tile.strip + share.row_part * kStrips);
    uint32_t x_at[kTiles];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) x_at[i] = x_base[i];
    for (int rel = 2 * column_part; rel < columns_end; rel += 2 * column_parts) {
      product.start_pair();
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        cp_async_wait<kStages - 2>();
        __syncwarp();
        stream.load((kStages - 1 + odd) % 2, previous);
        product.load_words(slot);
        previous = slot;
        slot += slot_step;
        if (slot == ring_end) slot = ring;
        const bool there = rel + odd < length;  // else zeros of x meet whatever the slot holds
        if constexpr (kGeneric) {
          if (!there) break;
          product.multiply_generic(x_at, odd, previous, (share.first + rel + odd) * 8);
        } else if constexpr (kBits == 16) {
          product.multiply(x_at, odd);
        } else {
          // A pair of blocks with one scale: it comes with the even one, is applied after the odd
          // one.
          if (odd == 0 || (!p.pair && there)) product.load_scales(previous);
          product.multiply(x_at, odd);
          if (odd == 0 ? !p.pair : (p.pair || there)) product.apply_scales();
        }
      }
#pragma unroll
      for (int i = 0; i < kTiles; ++i) x_at[i] += x_step[i];
    }
    result.add(tile, product.total);
  }
  result.end();
}

}  // namespace fastinfer::cuda
