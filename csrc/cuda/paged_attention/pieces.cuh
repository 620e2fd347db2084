// How the items of a slot are cut into pieces, and where their partial results are; see params.h.
#pragma once

#include "work.cuh"

namespace fastinfer::cuda {

// How an item is cut and where its partial results are.
struct Pieces {
  int count, ordinal;  // of this piece
  int base;            // CTA of the first piece; fixed pieces: its index
  int step;            // between the CTAs of neighbouring pieces
  bool fixed;
  int32_t* done;    // pieces of the item that are complete
  int32_t* claims;  // chunks of its merge that are taken, but for the first

  // A CTA holds at most one piece that another one began (2s) and one that another goes on with:
  // where the pieces of the item are, start() + k * apart(), but for the first.
  __device__ __forceinline__ int start() const { return fixed ? base : 2 * base; }
  __device__ __forceinline__ int apart() const { return fixed ? 1 : 2 * step; }
  __device__ __forceinline__ int first_off() const { return fixed ? 0 : 1; }
  __device__ __forceinline__ int index(int k) const {
    return start() + k * apart() + (k == 0 ? first_off() : 0);
  }
};

template <class P>
__device__ __forceinline__ Pieces cut_item(const P& p, const Slot& slot, const Walk& walk,
                                           int tile) {
  Pieces c{};
  c.fixed = p.invariant;
  int counter;
  if (c.fixed) {
    const int lowest = first_tile(walk.len, p.q_len, p.window_left) / kInvariantTiles;
    const int tiles = (walk.len + kPlanTile - 1) / kPlanTile;
    counter = walk.b * p.heads_kv * p.row_blocks + walk.pair(p, slot);
    c.count = max(1, (tiles + kInvariantTiles - 1) / kInvariantTiles - lowest);
    c.ordinal = tile / kInvariantTiles - lowest;
    c.base = counter * p.max_pieces;
    c.step = 1;
  } else {
    c.count = 1;
    const int behind = walk.position + walk.cost - slot.extra;  // the last tile
    if (walk.position >= slot.begin && behind <= slot.end) return c;
    const int first = slot.origin + walk.position / slot.share;
    c.count = slot.origin + (behind - 1) / slot.share - first + 1;
    c.ordinal = static_cast<int>(blockIdx.y) - first;
    counter = c.base = first * p.lanes + slot.lane;
    c.step = p.lanes;
  }
  c.done = p.counters + counter;
  c.claims = p.claims + counter;
  return c;
}

}  // namespace fastinfer::cuda
