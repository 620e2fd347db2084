// Sum over ranks, in place, through memory that the ranks write to each other (peer_slots.cuh), and
// behind it, on request, the residual addition and RMS norm of csrc/cuda/norm:
//
//   x = round(x_0 + x_1 + ...)      fp32, in the order of the ranks: the same bits on every rank
//   residual = round(residual + x), x = rms_norm(residual) * weight
//
// x: rows of packs of 16 bytes (a unit each), cut into tiles. With a norm a tile is a row, a block
// has a thread per pack; without, a tile is as many units as a block has threads.
//   one-shot   every rank pushes its tile to all others and adds up what it is sent
//   two-shot   rank tile % world owns the tile: the others push theirs to it, it pushes the sum
//
// A block first pushes all its tiles, then takes in what it owns, then the rest; every block of the
// grid is on the GPU at once, so nobody waits for a push that waits itself.
#pragma once

#include <cuda_runtime.h>

#include "../common/launch.cuh"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"
#include "peer_slots.cuh"

namespace fastinfer::cuda {

constexpr int kMaxTileThreads = 1024;

struct AllReduceLaunch {
  char* ranks[kMaxRanks];
  int rank, world;
  bool two_shot, aligned;  // aligned: rows of x begin at multiples of 16 bytes
  int64_t slot_bytes;
  uint64_t limit_ns;
  int* failed;
  void *x, *residual;
  const void* weight;
  int64_t x_stride, residual_stride;  // of rows, elements
  int64_t dim, row_units, units;      // elements and units of a row, units of all
  uint32_t tiles;
  float eps, inverse_dim;
};

// Where a thread works in a tile.
struct Place {
  int64_t unit, row, i;  // i: first element, of the row
  bool holds;
};

template <class E, bool kNorm>
__device__ __forceinline__ Place place_of(const AllReduceLaunch& a, uint32_t tile) {
  constexpr int kSize = Pack<E>::kSize;
  const int64_t thread = threadIdx.x;
  if (kNorm) return {tile * a.row_units + thread, tile, thread * kSize, thread < a.row_units};
  const int64_t unit = static_cast<int64_t>(tile) * blockDim.x + thread;
  const int64_t row = a.row_units == a.units ? 0 : unit / a.row_units;
  return {unit, row, (unit - row * a.row_units) * kSize, unit < a.units};
}

template <class E>
__device__ __forceinline__ bool is_pack(const AllReduceLaunch& a, const Place& at) {
  return a.aligned && at.i + Pack<E>::kSize <= a.dim;
}

template <class E, bool kNorm>
__device__ __forceinline__ uint4 load_x(const AllReduceLaunch& a, const Place& at) {
  if (!at.holds) return uint4{};
  const E* row = static_cast<const E*>(a.x) + at.row * a.x_stride;
  if (kNorm) return *reinterpret_cast<const uint4*>(row + at.i);
  return load_pack(row, static_cast<int>(at.i), static_cast<int>(a.dim), is_pack<E>(a, at));
}

template <class E, bool kNorm>
__device__ __forceinline__ void store_x(const AllReduceLaunch& a, const Place& at, const uint4& v) {
  E* row = static_cast<E*>(a.x) + at.row * a.x_stride;
  if (kNorm) {
    *reinterpret_cast<uint4*>(row + at.i) = v;
  } else {
    store_pack(row, static_cast<int>(at.i), static_cast<int>(a.dim), is_pack<E>(a, at), v);
  }
}

// The sum of a unit over the ranks, `mine` being this rank's; the loads of four slots are under way
// together.
template <class E>
__device__ __forceinline__ uint4 sum_of_ranks(const AllReduceLaunch& a, char* slots,
                                              const uint4& mine, Patience& patience) {
  constexpr int kSize = Pack<E>::kSize, kTogether = 4;
  const int world = a.world;
  float sum[kSize];
#pragma unroll
  for (int j = 0; j < kSize; ++j) sum[j] = -0.0f;  // the number that changes no other
#pragma unroll 1
  for (int from = 0; from < world; from += kTogether) {
    uint4 got[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k)
      if (from + k < world && from + k != a.rank)
        got[k] = load_pack_system(slots + (from + k) * a.slot_bytes);
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int r = from + k;
      if (r >= world) break;
      float term[kSize];
      unpack<E>(term, r == a.rank ? mine : take(slots + r * a.slot_bytes, got[k], patience));
#pragma unroll
      for (int j = 0; j < kSize; ++j) sum[j] += term[j];
    }
  }
  return pack_of<E>(sum);
}

// The tree and the bits of csrc/cuda/norm for a row with a pack per thread; see norm.cuh.
template <class E>
__device__ __forceinline__ uint4 norm_of(const AllReduceLaunch& a, const uint4& x,
                                         const uint4& weight, float* found) {
  constexpr int kSize = Pack<E>::kSize;
  float y[kSize], w[kSize];
  unpack<E>(y, x);
  unpack<E>(w, weight);
  float squares = 0.0f;
#pragma unroll
  for (int j = 0; j < kSize; ++j) squares = __fmaf_rn(y[j], y[j], squares);
  squares = warp_reduce<Sum>(squares);
  const int lane = threadIdx.x % 32;
  if (lane == 0) found[threadIdx.x / 32] = squares;
  __syncthreads();
  squares = warp_reduce<Sum>(lane < static_cast<int>(blockDim.x) / 32 ? found[lane] : 0.0f);
  const float inv = rsqrtf(squares * a.inverse_dim + a.eps);
#pragma unroll
  for (int j = 0; j < kSize; ++j) y[j] = y[j] * inv * w[j];
  return pack_of<E>(y);
}

template <class E>
__device__ __forceinline__ uint4 rounded_sum(const uint4& a, const uint4& b) {
  float u[Pack<E>::kSize], v[Pack<E>::kSize];
  unpack<E>(u, a);
  unpack<E>(v, b);
#pragma unroll
  for (int j = 0; j < Pack<E>::kSize; ++j) u[j] += v[j];
  return pack_of<E>(u);
}

template <class E, bool kNorm>
__global__ void __launch_bounds__(kMaxTileThreads)
    all_reduce_kernel(const __grid_constant__ AllReduceLaunch a) {
  __shared__ float found[32];
  const int world = a.world;
  uint4 weight{};
  if (kNorm && threadIdx.x < a.row_units) weight = static_cast<const uint4*>(a.weight)[threadIdx.x];
  grid_launch_dependents();
  grid_wait();

  char* own = a.ranks[a.rank];
  PeerHeader* header = reinterpret_cast<PeerHeader*>(own);
  const uint2 state = load_pair_gpu(header);
  const uint32_t half = state.x, dead = state.y;
  const uint32_t first_tile = blockIdx.x, step = gridDim.x;
  const Place first_at = place_of<E, kNorm>(a, first_tile);
  const uint4 first = load_x<E, kNorm>(a, first_at);
  const int64_t base = kPeerHeaderBytes + half * (world + 1) * a.slot_bytes;
  const int64_t to = base + a.rank * a.slot_bytes;
  for (uint32_t tile = first_tile; tile < a.tiles; tile += step) {
    const Place at = place_of<E, kNorm>(a, tile);
    const uint4 v = sendable(tile == first_tile ? first : load_x<E, kNorm>(a, at));
    const int owner = a.two_shot ? static_cast<int>(tile % static_cast<uint32_t>(world)) : -1;
#pragma unroll 1
    for (int r = 0; r < world; ++r)
      if (r != a.rank && (owner < 0 || owner == r) && at.holds)
        store_pack_system(a.ranks[r] + to + at.unit * 16, v);
  }
  // All of this block have read `half`. Who is the last is looked at in the end, when the answer is
  // long there.
  __syncthreads();
  uint32_t before_us = 0;
  if (threadIdx.x == 0 && step > 1) before_us = atomicAdd(&header->arrived, 1u);

  Patience patience(header, a.failed, a.limit_ns, dead != 0);
  const int64_t sums = base + world * a.slot_bytes;
  for (int pass = 0; pass < (a.two_shot ? 2 : 1); ++pass) {
    for (uint32_t tile = first_tile; tile < a.tiles; tile += step) {
      const bool owns =
          !a.two_shot || static_cast<int>(tile % static_cast<uint32_t>(world)) == a.rank;
      if (owns != (pass == 0)) continue;
      const Place at = place_of<E, kNorm>(a, tile);
      uint4 v = tile == first_tile ? first : load_x<E, kNorm>(a, at), before{};
      uint4* residual = nullptr;
      if (kNorm && at.holds) {
        residual = reinterpret_cast<uint4*>(static_cast<E*>(a.residual) +
                                            at.row * a.residual_stride + at.i);
        before = *residual;
      }
      if (at.holds) {
        if (owns) {
          v = sum_of_ranks<E>(a, own + base + at.unit * 16, v, patience);
          if (a.two_shot) {
            const uint4 sum = sendable(v);
#pragma unroll 1
            for (int r = 0; r < world; ++r)
              if (r != a.rank) store_pack_system(a.ranks[r] + sums + at.unit * 16, sum);
          }
        } else {
          char* slot = own + sums + at.unit * 16;
          v = take(slot, load_pack_system(slot), patience);
        }
      }
      if (kNorm) {
        v = rounded_sum<E>(v, before);
        if (at.holds) *residual = v;
        v = norm_of<E>(a, v, weight, found);
        if (a.tiles > step) __syncthreads();  // before `found` is written again
      }
      if (at.holds) store_x<E, kNorm>(a, at, v);
    }
  }
  if (threadIdx.x == 0 && before_us == step - 1) {  // the next call, which waits for this one
    header->arrived = 0;
    header->half = half ^ 1;
  }
}

}  // namespace fastinfer::cuda
