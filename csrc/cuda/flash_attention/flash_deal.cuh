// Dealing tiles of work to the CTAs of a persistent grid: round r gives one tile to every CTA,
// every second round in reverse order, so that with tiles in order of falling length all CTAs end
// up with the same amount. Measured on models of the benchmark grid this is within 1 % of dealing
// to whoever is free, and needs no counter in memory.
#pragma once

#include "flash_work.cuh"

namespace fastinfer::cuda::flash {

// Packed tiles in order of falling length. The length of tile m of sequence b is taken as the key
// tiles up to its last visible key (a left window is left out; any order is a valid one). For that
// order rank -> (b, m) is found by bisection over the length, as tiles of at least a given length
// can be counted per sequence. Called by a whole warp; ranks must not fall from call to call.
template <int kRows, int kKeys>
struct SortedTiles {
  const FlashAttentionParams& p;
  int32_t longest;  // no tile left is longer

  struct Sequence {
    int32_t tiles, len_k, reach;  // reach: keys a row in front of row 0 would see
  };
  __device__ __forceinline__ Sequence sequence(int32_t b) const {
    if (b >= p.batch) return {0, 0, 0};
    Work w{b};
    packed_lengths(p, w);
    return {w.len_q > 0 ? (w.len_q - 1) / kRows + 1 : 0, w.len_k,
            w.len_k - w.len_q + p.window_right};
  }
  // Tiles of the sequence of at least `length` key tiles.
  __device__ __forceinline__ int32_t count(const Sequence& s, int32_t length) const {
    if (length <= 0) return s.tiles;
    const int32_t keys = (length - 1) * kKeys;
    if (s.len_k <= keys) return 0;
    if (p.window_right < 0 || keys < s.reach) return s.tiles;
    return max(s.tiles - (keys - s.reach) / kRows, 0);
  }
  __device__ __forceinline__ int32_t count_all(int32_t length) const {
    int32_t sum = 0;
    for (int32_t first = 0; first < p.batch; first += 32)
      sum += count(sequence(first + threadIdx.x % 32), length);
    return __reduce_add_sync(kAllLanes, sum);
  }

  __device__ __forceinline__ void start() {
    int32_t most = 0;
    for (int32_t first = 0; first < p.batch; first += 32)
      most = max(most, sequence(first + threadIdx.x % 32).len_k);
    longest = (__reduce_max_sync(kAllLanes, most) + kKeys - 1) / kKeys;
  }

  // False past the last tile. Head aside: sets batch, row and the lengths.
  __device__ __forceinline__ bool find(int32_t rank, Work& w) {
    int32_t low = 0, high = longest;  // the largest length of which more than `rank` tiles are
    while (low < high) {
      const int32_t middle = (low + high + 1) / 2;
      if (count_all(middle) > rank)
        low = middle;
      else
        high = middle - 1;
    }
    longest = low;
    int32_t before = count_all(low + 1);  // longer ones
    for (int32_t first = 0; first < p.batch; first += 32) {
      const Sequence s = sequence(first + threadIdx.x % 32);
      const int32_t longer = count(s, low + 1), here = count(s, low) - longer;
      int32_t sum = here;
#pragma unroll
      for (int32_t d = 1; d < 32; d *= 2) {
        const int32_t other = __shfl_up_sync(kAllLanes, sum, d);
        if (threadIdx.x % 32 >= d) sum += other;
      }
      const unsigned reached = __ballot_sync(kAllLanes, before + sum > rank);
      if (reached) {
        const int32_t owner = __ffs(reached) - 1;
        const int32_t tile = s.tiles - 1 - longer - (rank - before - (sum - here));
        w.batch = first + owner;
        w.row = __shfl_sync(kAllLanes, tile, owner) * kRows;
        packed_lengths(p, w);
        return true;
      }
      before += __shfl_sync(kAllLanes, sum, 31);
    }
    return false;
  }
};

}  // namespace fastinfer::cuda::flash
