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
  int begin, end;  // cost, of the lane's list; in clusters, of the item
  int share, lane;
  int b, first_cost;  // sequence at `begin`, cost of those before it
  int extra;          // cost of an item on top of its tiles
  int origin;         // CTA of the lane that has cost 0
  int parts, part;    // of clusters, this one; 0: not in clusters
  bool works;         // anything to do?
};

// The end of an item takes about as long as some tiles of keys, which matters where CTAs of long
// shares have different numbers of items. `total`: of a lane, without.
template <class P>
__device__ __forceinline__ int extra_cost(const P& p, int total, bool lengths_differ) {
  return lengths_differ && total >= kLongShare * static_cast<int>(gridDim.y) ? p.item_cost : 0;
}

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

__device__ __forceinline__ int running_sum(int x, int lane) {
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const int other = __shfl_up_sync(kAllLanes, x, i);
    if (lane >= i) x += other;
  }
  return x;
}

// A share with the end of one item and the beginning of another makes the second wait for the merge
// of the first. Where shares are short, and CTAs are left over or shares need to be but little
// longer, every CTA has a part of one item. `own`: cost of sequence threadIdx.x % 32.
template <class P>
__device__ __forceinline__ bool align_shares(const P& p, int own, Slot& s) {
  const bool may = p.batch > 1 && p.lane_items == 1 && s.share > 1 && s.share <= kShortShare;
  if (__builtin_expect(!may || p.invariant, 1)) return false;
  const int b = threadIdx.x % 32, most = s.share + s.share / 4 + 1, slot = blockIdx.y;
#pragma unroll 1
  for (int share = s.share; share <= most; ++share) {
    const int parts = (own + share - 1) / static_cast<unsigned>(share);
    if (__reduce_add_sync(kAllLanes, parts) > static_cast<int>(gridDim.y)) continue;
    const int sum = running_sum(parts, b);
    const unsigned behind = __ballot_sync(kAllLanes, sum > slot);
    s.b = max(__ffs(behind) - 1, 0);
    s.origin = __shfl_sync(kAllLanes, sum - parts, s.b);
    s.share = share;
    s.begin = (slot - s.origin) * share;
    s.end = min(s.begin + share, __shfl_sync(kAllLanes, own, s.b));
    s.works = behind != 0;
    return true;
  }
  return false;
}

// Sets out for the lengths before anything else: of sequence threadIdx.x % 32 where find_slot()
// needs no more; its cost, where there is a plan.
template <class P>
__device__ __forceinline__ int first_length(const P& p) {
  const int b = threadIdx.x % 32;
  if (p.batch > 32 || b >= p.batch) return 0;
  return p.plan ? p.plan[kPlanHeader + b + 1] - p.plan[kPlanHeader + b] : sequence_length(p, b);
}

// A launch of clusters whose sequences are short gives every item clusters of its own: slot.parts
// of them, each of which has its share. Others end at once. `own`: cost of sequence threadIdx.x
// % 32.
template <class P>
__device__ __forceinline__ bool find_cluster(const P& p, int own, int total, Slot& s) {
  const int longest = __reduce_max_sync(kAllLanes, own);
  const auto parted = [](int n, int shift) { return (n + (1 << shift) - 1) >> shift; };
  if (p.most_share < kAlways) {
    const int share = (total + gridDim.y - 1) / gridDim.y;
    const int each = parted(longest, p.cluster_shift + p.parts_shift);
    if (share < p.least_share || share > p.most_share || each > 2 * share + 2) return false;
  }
  const int at = blockIdx.y * gridDim.x + blockIdx.x;
  const int item = at >> (p.cluster_shift + p.parts_shift);
  if (item >= p.batch * p.lanes) return true;
  s.part = (at >> p.cluster_shift) & ((1 << p.parts_shift) - 1);
  s.b = p.batch == 1 ? 0 : item / static_cast<unsigned>(p.lanes);
  s.lane = item - s.b * p.lanes;
  const int cost = __shfl_sync(kAllLanes, own, s.b);
  const int wanted = parted(cost, p.cluster_shift + kPartShift);
  const int shift = min(p.parts_shift, 32 - __clz(wanted - 1));
  s.parts = 1 << shift;
  if (s.part >= s.parts) return true;
  s.share = parted(cost, p.cluster_shift + shift);
  s.begin = ((s.part << p.cluster_shift) + (at & ((1 << p.cluster_shift) - 1))) * s.share;
  s.end = min(s.begin + s.share, cost);
  s.works = true;
  return true;
}

// Every thread calls. `scratch`: P::kWarps + 2 ints of shared memory.
template <class P>
__device__ __forceinline__ Slot find_slot(const P& p, int length, int* scratch) {
  const int items = p.lane_items, tid = threadIdx.x;
  Slot s{};
  if (p.batch <= 32) {  // every warp by itself, without a barrier
    const int b = tid % 32;
    int own = 0;
    if (b < p.batch) own = p.plan ? length : sequence_cost(length, p.q_len, p.window_left);
    int sum = p.batch > 1 ? running_sum(own, b) : own;
    const int total = __shfl_sync(kAllLanes, sum, p.batch - 1) * items;
    const int first = __shfl_sync(kAllLanes, own, 0);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if constexpr (P::kClusters)
      if (p.cluster_shift > 0 && find_cluster(p, own, total, s)) return s;
#endif
    s.extra = extra_cost(p, total, __any_sync(kAllLanes, b < p.batch && own != first));
    own += s.extra, sum += s.extra * (b + 1);
    set_share(p, total + s.extra * p.batch * items, s);
    if (s.extra == 0 && align_shares(p, own, s)) return s;
    // The first sequence that ends behind `begin`.
    const unsigned behind = __ballot_sync(kAllLanes, b < p.batch && sum * items > s.begin);
    s.b = max(__ffs(behind) - 1, 0);
    s.first_cost = __shfl_sync(kAllLanes, sum - own, s.b);
    s.works = s.begin < s.end;
    return s;
  }
  if (p.plan) {
    const int32_t* sums = p.plan + kPlanHeader;
    const int total = sums[p.batch] * items, first = sums[1];
    if (extra_cost(p, total, true) > 0) {
      bool differ = false;
#pragma unroll 1
      for (int b = tid; b < p.batch; b += P::kThreads) differ = differ || sums[b] != b * first;
      s.extra = extra_cost(p, total, __syncthreads_or(differ) || sums[p.batch] != p.batch * first);
    }
    set_share(p, total + s.extra * p.batch * items, s);
#pragma unroll 1
    for (int b = tid; b < p.batch; b += P::kThreads) {
      const int before = sums[b] + s.extra * b, after = sums[b + 1] + s.extra * (b + 1);
      if (before * items <= s.begin && s.begin < after * items) {
        scratch[P::kWarps] = b;
        scratch[P::kWarps + 1] = before;
      }
    }
  } else {
    const int each = (p.batch + P::kThreads - 1) / P::kThreads;
    const int from = min(tid * each, p.batch), to = min(from + each, p.batch);
    const int first = sequence_cost(sequence_length(p, 0), p.q_len, p.window_left);
    int own = 0;
    bool differ = false;
#pragma unroll 1
    for (int b = from; b < to; ++b) {
      const int cost = sequence_cost(sequence_length(p, b), p.q_len, p.window_left);
      own += cost;
      differ = differ || cost != first;
    }
    const int sum = running_sum(own, tid % 32);
    if (tid % 32 == 31) scratch[tid / 32] = sum;
    differ = __syncthreads_or(differ);
    int total = 0, before = sum - own;
#pragma unroll
    for (int w = 0; w < P::kWarps; ++w) {
      if (w < tid / 32) before += scratch[w];
      total += scratch[w];
    }
    s.extra = extra_cost(p, total * items, differ);
    before += s.extra * from, own += s.extra * (to - from);
    set_share(p, (total + s.extra * p.batch) * items, s);
    if (before * items <= s.begin && s.begin < (before + own) * items) {
      int b = from;
#pragma unroll 1
      for (;; ++b) {
        const int cost = sequence_cost(sequence_length(p, b), p.q_len, p.window_left) + s.extra;
        if (s.begin < (before + cost) * items) break;
        before += cost;
      }
      scratch[P::kWarps] = b;
      scratch[P::kWarps + 1] = before;
    }
  }
  __syncthreads();
  s.works = s.begin < s.end;
  if (s.works) {
    s.b = scratch[P::kWarps];
    s.first_cost = scratch[P::kWarps + 1];
  }
  return s;
}

// One item of a slot and the tiles [tile, end) of it that the slot does.
struct Walk {
  int b, item;         // item of the lane
  int position;        // cost before this item
  int cost, len, low;  // low: first key that is visible to some row
  int row;             // of the cache
  int tile, end;

  template <class P>
  __device__ __forceinline__ void load_sequence(const P& p, int extra) {
    len = sequence_length(p, b);
    low = p.window_left < 0 ? 0 : max(len - p.q_len - p.window_left, 0);
    if (p.leftpad) low = max(low, __ldg(p.leftpad + b * p.leftpad_stride));
    row = p.cache_rows ? __ldg(p.cache_rows + b * p.cache_rows_stride) : b;
    cost = sequence_cost(len, p.q_len, p.window_left) + extra;
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
    load_sequence(p, s.extra);
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
      load_sequence(p, s.extra);
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
