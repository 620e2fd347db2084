// Which keys of which (sequence, key head, row block) a CTA works on; see params.h.
//
// The running cost of the sequences comes from the plan, or else every CTA adds it up by itself
// from the lengths: one load and one block-wide scan, cheaper than a launch. A Walk then steps
// through the items of the slot; the loader and the arithmetic each have one, the loader some tiles
// ahead.
#pragma once

#include "../common/reduce.cuh"
#include "params.h"

namespace fastinfer::cuda {

constexpr int kDecodeThreads = 128;
constexpr int kDecodeWarps = kDecodeThreads / 32;

template <class P>
__device__ __forceinline__ int sequence_length(const P& p, int b) {
  return (p.lengths ? __ldg(p.lengths + b * p.lengths_stride) : p.capacity) + p.append;
}

// First tile that a plan counts.
__device__ __forceinline__ int first_tile(int len, int q_len, int window_left) {
  if (window_left < 0) return 0;
  return min(max(len - q_len - window_left, 0), len) / kPlanTile;
}

__device__ __forceinline__ int sequence_cost(int len, int q_len, int window_left) {
  return max(1, (len + kPlanTile - 1) / kPlanTile - first_tile(len, q_len, window_left));
}

struct Slot {
  int begin, end;  // cost, of the lane's list
  int share, lane;
  int b, first_cost;  // sequence at `begin`, cost of those before it
};

template <class P>
__device__ __forceinline__ void set_share(const P& p, int total, Slot& s) {
  const int slots = gridDim.y;
  s.lane = blockIdx.x;
  s.share = max(p.min_share, (total + slots - 1) / static_cast<unsigned>(slots));
  // Fewer pieces to merge are worth more than more CTAs.
  const int items = p.batch * p.lane_items;
  if (s.share == 1 && total > 16 * items) s.share = total > 24 * items ? 3 : 2;
  s.begin = blockIdx.y * s.share;
  s.end = min(s.begin + s.share, total);
}

// Sets out for the lengths before anything else: of sequence threadIdx.x % 32 where find_slot()
// needs no more.
template <class P>
__device__ __forceinline__ int first_length(const P& p) {
  const int b = threadIdx.x % 32;
  return p.batch <= 32 && !p.plan && b < p.batch ? sequence_length(p, b) : 0;
}

// Every thread calls. `scratch`: 8 ints of shared memory. A slot without work has begin >= end.
template <class P>
__device__ __forceinline__ Slot find_slot(const P& p, int length, int* scratch) {
  const int items = p.lane_items, tid = threadIdx.x;
  Slot s{};
  if (p.batch <= 32 && !p.plan) {  // every warp by itself, without a barrier
    const int b = tid % 32;
    int own = 0;
    if (b < p.batch) own = sequence_cost(length, p.q_len, p.window_left);
    int sum = own;
    if (p.batch > 1) {
#pragma unroll
      for (int lane = 1; lane < 32; lane *= 2) {
        const int other = __shfl_up_sync(kAllLanes, sum, lane);
        if (b >= lane) sum += other;
      }
    }
    set_share(p, __shfl_sync(kAllLanes, sum, p.batch - 1) * items, s);
    // The first sequence that ends behind `begin`.
    const unsigned behind = __ballot_sync(kAllLanes, b < p.batch && sum * items > s.begin);
    s.b = max(__ffs(behind) - 1, 0);
    s.first_cost = __shfl_sync(kAllLanes, sum - own, s.b);
    return s;
  }
  if (p.plan) {
    const int32_t* sums = p.plan + kPlanHeader;
    set_share(p, sums[p.batch] * items, s);
#pragma unroll 1
    for (int b = tid; b < p.batch; b += kDecodeThreads) {
      const int before = sums[b];
      if (before * items <= s.begin && s.begin < sums[b + 1] * items) {
        scratch[4] = b;
        scratch[5] = before;
      }
    }
  } else {
    const int each = (p.batch + kDecodeThreads - 1) / kDecodeThreads;
    const int from = min(tid * each, p.batch), to = min(from + each, p.batch);
    int own = 0;
#pragma unroll 1
    for (int b = from; b < to; ++b)
      own += sequence_cost(sequence_length(p, b), p.q_len, p.window_left);
    int sum = own;
#pragma unroll
    for (int lane = 1; lane < 32; lane *= 2) {
      const int other = __shfl_up_sync(kAllLanes, sum, lane);
      if (tid % 32 >= lane) sum += other;
    }
    if (tid % 32 == 31) scratch[tid / 32] = sum;
    __syncthreads();
    int total = 0, before = sum - own;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      if (w < tid / 32) before += scratch[w];
      total += scratch[w];
    }
    set_share(p, total * items, s);
    if (before * items <= s.begin && s.begin < (before + own) * items) {
      int b = from;
#pragma unroll 1
      for (;; ++b) {
        const int cost = sequence_cost(sequence_length(p, b), p.q_len, p.window_left);
        if (s.begin < (before + cost) * items) break;
        before += cost;
      }
      scratch[4] = b;
      scratch[5] = before;
    }
  }
  __syncthreads();
  if (s.begin < s.end) {
    s.b = scratch[4];
    s.first_cost = scratch[5];
  }
  return s;
}

// One item of a slot and the tiles [tile, end) of it that the slot does.
struct Walk {
  int b, item;   // item of the lane
  int position;  // cost before this item
  int cost, len, low,
      row;  // keys of the sequence, first one that is visible to some row, cache row
  int tile, end;

  template <class P>
  __device__ __forceinline__ void load_sequence(const P& p) {
    len = sequence_length(p, b);
    low = p.window_left < 0 ? 0 : max(len - p.q_len - p.window_left, 0);
    if (p.leftpad) low = max(low, __ldg(p.leftpad + b * p.leftpad_stride));
    row = p.cache_rows ? __ldg(p.cache_rows + b * p.cache_rows_stride) : b;
    cost = sequence_cost(len, p.q_len, p.window_left);
  }

  template <class P>
  __device__ __forceinline__ void cut(const P& p, const Slot& s) {
    const int lowest = first_tile(len, p.q_len, p.window_left);
    const int tiles = (len + kPlanTile - 1) / kPlanTile - lowest;
    tile = max(s.begin - position, 0);
    end = min(s.end - position, tiles);
    if (p.invariant) {
      // Whole pieces; two tiles are the largest step of a CTA, so the first piece starts at an even
      // one, wherever the window does.
      const auto round_up = [](int t) {
        return (t + kInvariantTiles - 1) / kInvariantTiles * kInvariantTiles;
      };
      tile = tile > 0 ? round_up(tile + lowest) : lowest & ~1;
      end = end >= tiles ? tiles + lowest
            : end > 0    ? min(round_up(end + lowest), tiles + lowest)
                         : 0;
    } else {
      tile += lowest;
      end += lowest;
    }
    if (tiles <= 0) end = tile = 0;
  }

  template <class P>
  __device__ __forceinline__ void start(const P& p, const Slot& s) {
    b = s.b;
    load_sequence(p);
    item = p.lane_items == 1 ? 0 : (s.begin - s.first_cost * p.lane_items) / cost;
    position = s.first_cost * p.lane_items + item * cost;
    cut(p, s);
  }

  // False when the slot holds no further item.
  template <class P>
  __device__ __forceinline__ bool next(const P& p, const Slot& s) {
    position += cost;
    if (position >= s.end) return false;
    if (++item == p.lane_items) {
      item = 0;
      ++b;
      load_sequence(p);
    }
    cut(p, s);
    return true;
  }

  // kv head * row_blocks + row block
  template <class P>
  __device__ __forceinline__ int pair(const P& p, const Slot& s) const {
    return item * p.lanes + s.lane;
  }
  __device__ __forceinline__ bool has_tiles() const { return tile < end; }
};

}  // namespace fastinfer::cuda
