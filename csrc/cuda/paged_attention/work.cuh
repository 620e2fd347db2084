// Which keys of which (sequence, key head, row block) a CTA works on; see params.h.
//
// The running cost of the sequences comes from the plan, or else every CTA adds it up by itself from
// the lengths: one load and one block-wide scan, cheaper than a launch. A Walk then steps through
// the items of the slot; the loader and the arithmetic each have one, the loader some tiles ahead.
#pragma once

#include "../common/reduce.cuh"
#include "params.h"

namespace fastinfer::cuda {

constexpr int kDecodeThreads = 128;
constexpr int kDecodeWarps = kDecodeThreads / 32;

__device__ __forceinline__ int sequence_length(const DecodeParams& p, int b) {
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
  int begin, end;       // cost
  int share, lane;
  int b, first_cost;    // sequence at `begin`, cost of those before it
};

// Every thread calls. `scratch`: 8 ints of shared memory. A slot without work has begin >= end.
__device__ __forceinline__ Slot find_slot(const DecodeParams& p, int* scratch) {
  const int items = p.lane_items, tid = threadIdx.x;
  const int slot = blockIdx.x / p.lanes, slots = gridDim.x / p.lanes;
  Slot s{};
  s.lane = blockIdx.x - slot * p.lanes;
  if (p.plan) {
    const int32_t* sums = p.plan + kPlanHeader;
    const int total = sums[p.batch] * items;
    s.share = max(p.min_share, (total + slots - 1) / slots);
    s.begin = slot * s.share;
    s.end = min(s.begin + s.share, total);
    for (int b = tid; b < p.batch; b += kDecodeThreads) {
      const int before = sums[b];
      if (before * items <= s.begin && s.begin < sums[b + 1] * items) {
        scratch[4] = b;
        scratch[5] = before;
      }
    }
    __syncthreads();
  } else {
    const int each = (p.batch + kDecodeThreads - 1) / kDecodeThreads;
    const int from = min(tid * each, p.batch), to = min(from + each, p.batch);
    int own = 0;
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
    total *= items;
    s.share = max(p.min_share, (total + slots - 1) / slots);
    s.begin = slot * s.share;
    s.end = min(s.begin + s.share, total);
    if (before * items <= s.begin && s.begin < (before + own) * items) {
      int b = from;
      for (;; ++b) {
        const int cost = sequence_cost(sequence_length(p, b), p.q_len, p.window_left);
        if (s.begin < (before + cost) * items) break;
        before += cost;
      }
      scratch[4] = b;
      scratch[5] = before;
    }
    __syncthreads();
  }
  if (s.begin < s.end) {
    s.b = scratch[4];
    s.first_cost = scratch[5];
  }
  return s;
}

// One item of a slot and the tiles [tile, end) of it that the slot does.
struct Walk {
  int b, item;      // item of the lane
  int position;     // cost before this item
  int cost, len, low, row;  // keys of the sequence, first one that is visible to some row, cache row
  int tile, end;

  __device__ __forceinline__ void load_sequence(const DecodeParams& p) {
    len = sequence_length(p, b);
    low = p.window_left < 0 ? 0 : max(len - p.q_len - p.window_left, 0);
    if (p.leftpad) low = max(low, __ldg(p.leftpad + b * p.leftpad_stride));
    row = p.cache_rows ? __ldg(p.cache_rows + b * p.cache_rows_stride) : b;
    cost = sequence_cost(len, p.q_len, p.window_left);
  }

  __device__ __forceinline__ void cut(const DecodeParams& p, const Slot& s) {
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
      end = end >= tiles ? tiles + lowest : end > 0 ? min(round_up(end + lowest), tiles + lowest) : 0;
    } else {
      tile += lowest;
      end += lowest;
    }
    if (tiles <= 0) end = tile = 0;
  }

  __device__ __forceinline__ void start(const DecodeParams& p, const Slot& s) {
    b = s.b;
    load_sequence(p);
    item = (s.begin - s.first_cost * p.lane_items) / cost;
    position = s.first_cost * p.lane_items + item * cost;
    cut(p, s);
  }

  // False when the slot holds no further item.
  __device__ __forceinline__ bool next(const DecodeParams& p, const Slot& s) {
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
  __device__ __forceinline__ int pair(const DecodeParams& p, const Slot& s) const {
    return item * p.lanes + s.lane;
  }
  __device__ __forceinline__ bool has_tiles() const { return tile < end; }
};

}  // namespace fastinfer::cuda
