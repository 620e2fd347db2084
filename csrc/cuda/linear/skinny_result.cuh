// The end of a tile of the skinny kernel: the warps' sums are added in order of their columns, then
// the ranks', then bias and rounding.
//
// Ranks of a cluster leave their sums in shared memory and add them up while the next tile already
// runs. Ranks that are no cluster (before sm_90) leave them in memory; the last to come adds up.
#pragma once

#include "../ptx/cluster.cuh"
#include "skinny_load.cuh"

namespace fastinfer::cuda {

template <class E, int kTiles, int kStrips, int kWarps>
struct SkinnyResult {
  static constexpr int kRows = 16 * kStrips, kLogRows = kRows == 16 ? 4 : kRows == 32 ? 5 : 6;
  static constexpr int kPitch = kRows + 4, kThreads = 32 * kWarps;
  static constexpr int kBuffers = kTiles == 1 ? 2 : 1;

  const SkinnyParams& p;
  unsigned char* shared;
  const SkinnyShared& at;
  int rank, column_parts;
  int buffer = 0, waiting = -1, waiting_rows = 0;  // tile whose ranks' sums are under way

  __device__ __forceinline__ void add(const SkinnyTile& tile,
                                      const float (&total)[kStrips][kTiles][4]) {
    const int rows = tile.count * 16;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {                                       // 8 tokens at a time
      const int tokens = min(p.m - 8 * i, 8), pitch = min(p.m, 8) * kPitch;  // of a warp
      if (i > 0 && tokens <= 0) break;
      if constexpr (kBuffers == 1) __syncthreads();  // the last ones are read
      float* partial = reinterpret_cast<float*>(shared + at.partial) +
                       (kBuffers == 2 ? buffer : 0) * kWarps * pitch;
      leave(partial, pitch, tokens, total, i);
      __syncthreads();
      if (i == 0 && p.clustered && waiting >= 0) {
        cluster_wait_shared();
        finish(buffer ^ 1);
      }
      add_warps(partial, pitch, tokens, tile, rows, i);
    }
    if (p.clustered) {
      cluster_arrive_shared();
      waiting = tile.strip, waiting_rows = rows;
    } else if (p.ranks > 1) {
      add_last(tile, rows);
    }
    buffer ^= 1;
  }
  // After the last tile.
  __device__ __forceinline__ void end() {
    if (p.clustered) {
      if (waiting >= 0) {
        cluster_wait_shared();
        finish(buffer ^ 1);
      }
      cluster_sync_shared();  // others may still read this CTA's sums
    }
  }

 private:
  __device__ __forceinline__ void store(int token, int row, float v) const {
    if (row >= p.n) return;
    if (p.bias) v = __fadd_rn(v, to_float(static_cast<const E*>(p.bias)[row]));
    static_cast<E*>(p.out)[token * p.out_stride + row] = from_float<E>(v);
  }
  __device__ __forceinline__ void leave(float* partial, int pitch, int tokens,
                                        const float (&total)[kStrips][kTiles][4], int i) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g8 = lane / 4, t = lane % 4;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (2 * t + e < tokens) {
        float* to = partial + warp * pitch + (2 * t + e) * kPitch + g8;
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
          to[16 * s] = total[s][i][e];
          to[16 * s + 8] = total[s][i][e + 2];
        }
      }
    }
  }
  __device__ __forceinline__ void add_warps(const float* partial, int pitch, int tokens,
                                            const SkinnyTile& tile, int rows, int i) {
    const int log_rows = kLogRows + p.row_shift, tile_rows = kRows << p.row_shift;
    for (int e = threadIdx.x; e < tokens << log_rows; e += kThreads) {
      const int token = e >> log_rows, row = e & (tile_rows - 1);
      const float* values = partial + row / kRows * pitch + token * kPitch + row % kRows;
      float v = values[0];
#pragma unroll 8
      for (int c = 1; c < column_parts; ++c) v += values[(c << p.row_shift) * pitch];
      if (p.ranks == 1) {
        if (row < rows) store(8 * i + token, tile.strip * 16 + row, v);
      } else if (p.clustered) {
        reinterpret_cast<float*>(shared +
                                 at.sums)[((buffer * p.m + 8 * i + token) << log_rows) + row] = v;
      } else {
        const int64_t first_token =
            (static_cast<int64_t>(tile.strip) * p.ranks + rank) * p.m + 8 * i;
        p.partial[(first_token + token) * kRows + row] = v;
      }
    }
  }
  // In order; the loads, which take long, are under way together.
  template <class Load>
  __device__ __forceinline__ float add_ranks(Load load) const {
    float v[kSkinnyRanks];
#pragma unroll
    for (int r = 0; r < kSkinnyRanks; ++r)
      if (r < p.ranks) v[r] = load(r);
#pragma unroll
    for (int r = 1; r < kSkinnyRanks; ++r)
      if (r < p.ranks) v[0] += v[r];
    return v[0];
  }
  // Adds the cluster's sums of tile `waiting` and writes this rank's share of it.
  __device__ __forceinline__ void finish(int which) const {
    const int log_rows = kLogRows + p.row_shift, tile_rows = kRows << p.row_shift;
    const float* mine = reinterpret_cast<const float*>(shared + at.sums) + which * p.m * tile_rows;
    for (int e = rank * kThreads + threadIdx.x; e < p.m << log_rows; e += p.ranks * kThreads) {
      const int row = e & (tile_rows - 1);
      if (row >= waiting_rows) continue;
      const float v = add_ranks([&](int r) { return cluster_load(mine + e, r); });
      store(e >> log_rows, waiting * 16 + row, v);
    }
  }
  // The last rank to come adds all up, in order.
  __device__ __forceinline__ void add_last(const SkinnyTile& tile, int rows) const {
    __threadfence();
    __syncthreads();
    int* last = reinterpret_cast<int*>(shared + at.sums);
    if (threadIdx.x == 0) {
      uint32_t* ticket = p.tickets + tile.strip;
      *last = atomicAdd(ticket, 1u) + 1 == static_cast<uint32_t>(p.ranks);
      if (*last) *ticket = 0;
    }
    __syncthreads();
    if (*last) {
      __threadfence();
      const float* all = p.partial + static_cast<int64_t>(tile.strip) * p.ranks * p.m * kRows;
      for (int e = threadIdx.x; e < p.m * kRows; e += kThreads) {
        const float v = add_ranks([&](int r) { return __ldcg(all + r * p.m * kRows + e); });
        if (e % kRows < rows) store(e / kRows, tile.strip * 16 + e % kRows, v);
      }
    }
    __syncthreads();
  }
};

}  // namespace fastinfer::cuda
