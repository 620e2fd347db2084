// Which rank's candidate for a row is the greatest: how ranks that share a vocabulary agree on
// greedy tokens (python/fastinfer/distributed/sampling.py).
//
//   out[b] = begin_r + ids_r[b]     of the first rank r whose logits_r[b, ids_r[b]] is the
//   greatest;
//                                   NaN counts as -inf, and so does a rank without logits
//
// A thread has a row. It sends a pack (value, token) to every other rank, as in peer_slots.cuh, and
// compares what it is sent in the order of the ranks: the same token on every one.
#include "../common/dtype.cuh"
#include "../common/launch.cuh"
#include "all_reduce.h"
#include "peer_slots.cuh"

namespace fastinfer::cuda {
namespace {

constexpr int kThreads = 128;

struct ArgmaxLaunch {
  char* ranks[kMaxRanks];
  int rank, world;
  int64_t slot_bytes;
  uint64_t limit_ns;
  int* failed;
  PeerArgmaxParams p;
};

__device__ __forceinline__ float value_at(const PeerArgmaxParams& p, int64_t i) {
  switch (p.dtype) {
    case DType::f32:
      return static_cast<const float*>(p.logits)[i];
    case DType::f16:
      return to_float(static_cast<const __half*>(p.logits)[i]);
    default:
      return to_float(static_cast<const __nv_bfloat16*>(p.logits)[i]);
  }
}

__global__ void __launch_bounds__(kThreads)
    peer_argmax_kernel(const __grid_constant__ ArgmaxLaunch a) {
  grid_launch_dependents();
  grid_wait();
  char* own = a.ranks[a.rank];
  PeerHeader* header = reinterpret_cast<PeerHeader*>(own);
  const uint2 state = load_pair_gpu(header);  // half, dead
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const bool holds = row < a.p.rows;
  float best = -INFINITY;
  int64_t token = a.p.begin;
  if (holds && a.p.columns > 0) {
    const int64_t id = a.p.ids[row];
    if (id >= 0 && id < a.p.columns) {
      token += id;
      best = value_at(a.p, row * a.p.stride + id);
    }
    if (!(best == best)) best = -INFINITY;
  }
  const int64_t at = kPeerHeaderBytes + state.x * (a.world + 1) * a.slot_bytes + row * 16;
  // No word is that of an empty slot: the value is no NaN, tokens are below 2^31.
  const uint4 mine{__float_as_uint(best), static_cast<uint32_t>(token), 0, 0};
  if (holds)
    for (int r = 0; r < a.world; ++r)
      if (r != a.rank) store_pack_system(a.ranks[r] + at + a.rank * a.slot_bytes, mine);
  __syncthreads();
  uint32_t before_us = 0;
  if (threadIdx.x == 0 && gridDim.x > 1) before_us = atomicAdd(&header->arrived, 1u);
  if (holds) {
    Patience patience(header, a.failed, a.limit_ns, state.y != 0);
    uint4 winner = mine;
    bool any = false;  // of a dead group only what has arrived counts, so that the token is one
    for (int r = 0; r < a.world; ++r) {
      uint4 said = mine;
      if (r != a.rank) {
        char* slot = own + at + r * a.slot_bytes;
        said = take(slot, load_pack_system(slot), patience);
      }
      if (!has_arrived(said)) continue;
      if (!any || __uint_as_float(said.x) > __uint_as_float(winner.x)) winner = said;
      any = true;
    }
    a.p.out[row] = winner.y;
  }
  if (threadIdx.x == 0 && before_us == gridDim.x - 1) {  // the next call, which waits for this one
    header->arrived = 0;
    header->half = state.x ^ 1;
  }
}

}  // namespace

int peer_argmax(const PeerArgmaxParams& p, void* stream) {
  const PeerGroup& g = *p.group;
  ArgmaxLaunch a{};
  for (int r = 0; r < g.world; ++r) a.ranks[r] = g.ranks[r];
  a.rank = g.rank, a.world = g.world, a.slot_bytes = g.slot_bytes;
  a.limit_ns = g.limit_ns, a.failed = g.failed, a.p = p;
  // As many rows as fit on the GPU together: nobody waits for a block that has not begun.
  const unsigned grid = static_cast<unsigned>((p.rows + kThreads - 1) / kThreads);
  return launch(peer_argmax_kernel, grid, kThreads, 0, stream, a);
}

int64_t peer_argmax_rows(const PeerGroup& group) {
  const int64_t slots = group.slot_bytes / 16;
  const int64_t resident = int64_t{device_facts().sms} * 8 * kThreads;
  return slots < resident ? slots : resident;
}

}  // namespace fastinfer::cuda
