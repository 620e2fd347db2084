// all_reduce.cuh for what decoding sends: one-shot, aligned, a tile for every block, with as little
// code as that needs. A message of a few KiB takes as long as its instructions take to fetch.
#pragma once

#include "all_reduce.cuh"

namespace fastinfer::cuda {

// kWorld: 2, or kMaxRanks for any number.
template <class E, int kWorld, bool kNorm>
__global__ void __launch_bounds__(kMaxTileThreads)
    all_reduce_few_kernel(const __grid_constant__ AllReduceLaunch a) {
  constexpr int kSize = Pack<E>::kSize;
  __shared__ float found[32];
  const uint32_t thread = threadIdx.x, tile = blockIdx.x;
  const uint32_t width = kNorm ? static_cast<uint32_t>(a.row_units) : blockDim.x;
  const uint32_t unit = tile * width + thread;
  const bool holds = kNorm ? thread < width : unit < static_cast<uint32_t>(a.units);
  uint4 weight{};
  if (kNorm && holds) weight = static_cast<const uint4*>(a.weight)[thread];
  grid_launch_dependents();
  grid_wait();

  char* own = a.ranks[a.rank];
  PeerHeader* header = reinterpret_cast<PeerHeader*>(own);
  const uint2 state = load_pair_gpu(header);  // half, dead
  uint4* x = static_cast<uint4*>(a.x) + unit;
  if (kNorm) x = reinterpret_cast<uint4*>(static_cast<E*>(a.x) + tile * a.x_stride) + thread;
  uint4 v{}, before{};
  if (holds) v = *x;
  uint4* residual = nullptr;
  if (kNorm) {
    residual =
        reinterpret_cast<uint4*>(static_cast<E*>(a.residual) + tile * a.residual_stride) + thread;
    if (holds) before = *residual;
  }
  const int world = kWorld == 2 ? 2 : a.world;
  // The region of rank r starts at r * slot_bytes.
  const int64_t at = kPeerHeaderBytes + state.x * (world + 1) * a.slot_bytes + int64_t{unit} * 16;
  const int64_t to = at + a.rank * a.slot_bytes;
  if (holds) {
    const uint4 sent = sendable(v);
    if (kWorld == 2) {
      store_pack_system(a.ranks[1 - a.rank] + to, sent);
    } else {
#pragma unroll 1
      for (int r = 0; r < world; ++r)
        if (r != a.rank) store_pack_system(a.ranks[r] + to, sent);
    }
  }
  __syncthreads();
  uint32_t before_us = 0;
  if (thread == 0 && gridDim.x > 1) before_us = atomicAdd(&header->arrived, 1u);
  if (holds) {
    Patience patience(header, a.failed, a.limit_ns, state.y != 0);
    if (kWorld == 2) {  // two terms: their order does not show
      char* slot = own + at + (1 - a.rank) * a.slot_bytes;
      v = rounded_sum<E>(v, take(slot, load_pack_system(slot), patience));
    } else {
      v = sum_of_ranks<E>(a, own + at, v, patience);
    }
  }
  if (kNorm) {
    v = rounded_sum<E>(v, before);
    if (holds) *residual = v;
    v = norm_of<E>(a, v, weight, found);
  }
  if (holds) *x = v;
  if (thread == 0 && before_us == gridDim.x - 1) {
    header->arrived = 0;
    header->half = state.x ^ 1;
  }
  static_assert(kSize * sizeof(E) == 16, "a unit is a pack");
}

// Whether all_reduce_few_kernel can do it in a grid of at most `most` blocks.
template <class E>
bool few_tiles(const AllReduceLaunch& a, bool norm, unsigned most) {
  const bool flat = a.aligned && a.row_units == a.units && a.dim % Pack<E>::kSize == 0;
  return !a.two_shot && a.tiles <= most && (norm || flat);
}

}  // namespace fastinfer::cuda
