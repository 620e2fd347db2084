// Decode attention: a few packed query rows per (sequence, key head) over a dense or paged cache.
//
//   o = softmax(scale q k^T, softcap, ALiBi, masks, sink) v,   grid: one CTA per slot (see params.h)
//
// A CTA of 4 warps works on one item at a time. row_tiles = 1, 2 or 4 warps form a team, one warp per 16
// rows; the 4 / row_tiles teams take different keys of a step of 4 slices and are merged at the end
// of a piece. Each warp loads one slice of every step (stream.cuh), reads all slices of its team
// (attend.cuh) and takes part in the merge (finish.cuh). No barrier of the CTA inside the loop.
#pragma once

#include "../common/launch.cuh"
#include "finish.cuh"
#include "stream.cuh"

namespace fastinfer::cuda {

__device__ __forceinline__ Item make_item(const DecodeParams& p, const Slot& slot, const Walk& walk) {
  Item item;
  item.b = walk.b;
  const int pair = walk.pair(p, slot);
  item.head = p.row_blocks == 1 ? pair : pair / p.row_blocks;
  item.row_block = pair - item.head * p.row_blocks;
  item.rows = min(p.rows - item.row_block * p.row_tiles * 16, p.row_tiles * 16);
  item.len = walk.len;
  item.first = item.low = walk.low;
  item.last = item.high = walk.len;
  const int first_row = item.row_block * p.row_tiles * 16;
  const int at_first = walk.len - p.q_len + first_row / p.group;
  const int at_last = walk.len - p.q_len + (first_row + item.rows - 1) / p.group;
  if (p.window_left >= 0) {
    item.first = max(item.first, at_first - p.window_left);
    item.low = max(item.low, at_last - p.window_left);
  }
  if (p.window_right >= 0) {
    item.high = min(item.high, at_first + p.window_right + 1);
    item.last = min(item.last, at_last + p.window_right + 1);
  }
  return item;
}

// A short block table on its way into the cache while the lengths are being read.
__device__ __forceinline__ void prefetch_rows(const DecodeParams& p) {
  if (!p.table) return;
  const int64_t line = (static_cast<int64_t>(blockIdx.x) * kDecodeThreads + threadIdx.x) * 32;
  if (line < p.batch * p.table_stride && line < 32 * 4096)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p.table + line));
}

template <class F, int D, DecodePath kPath>
__global__ void __launch_bounds__(kDecodeThreads, Layout<F, D>::kCtasPerSm)
    decode_kernel(const __grid_constant__ DecodeParams p) {
  using L = Layout<F, D>;
  using A = Attend<F, D, kPath == DecodePath::soft>;
  constexpr bool kBulk = kPath == DecodePath::bulk;
  extern __shared__ __align__(128) char shared[];
  const uint32_t ring = shared_address(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // Bulk copies bring `dim` columns only; what lies behind them in K must be 0, not NaN.
  auto clear_padding = [&](int stage) {
    if (p.dim == D) return;
    char* slice = shared + (stage * kDecodeWarps + warp) * L::kSlice;
    const int packs = (D - p.dim) * F::kBytes / 16;
    for (int i = lane; i < L::kTokens * packs; i += 32)
      *reinterpret_cast<uint4*>(slice + i / packs * L::kPitch + p.dim * F::kBytes +
                                i % packs * 16) = make_uint4(0, 0, 0, 0);
  };
  if constexpr (kBulk) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (threadIdx.x < L::kStages * kDecodeWarps)
      mbarrier_init(ring + L::kBarriers + threadIdx.x * 8, 1);
    mbarrier_init_fence();
    for (int s = 0; s < L::kStages; ++s) clear_padding(s);
#endif
  }
  prefetch_rows(p);
  const Slot slot = find_slot(p, reinterpret_cast<int*>(shared + L::kInts));
  if (slot.begin >= slot.end) {
    grid_wait();
    return;
  }
  Stream<F, D, kPath> stream(p, slot, ring);
#pragma unroll 1
  for (int s = 0; s < L::kStages - 1; ++s) stream.issue(s);
  // Lengths, tables and cached keys were complete before this kernel started; the queries, the
  // output and the workspace belong to kernels that may still run.
  grid_wait();
  grid_launch_dependents();

  const int team = warp / p.row_tiles, tile = warp - team * p.row_tiles;
  A a;
  a.q_shared = ring + L::kQuery + warp * (D / 16) * 512 + lane * 16;
  int stage = 0, parity = 0;
  Walk walk;
  walk.start(p, slot);
  do {
    Item item = make_item(p, slot, walk);
    if (walk.len <= 0) {
      const Finish<A> finish{p, item, shared, shared};
      finish.empty();
      continue;
    }
    for (int from = walk.tile; from < walk.end;) {
      int to = walk.end;
      if (p.invariant) to = min(to, (from / kInvariantTiles + 1) * kInvariantTiles);
      const int end = min(walk.len, to * kPlanTile);
      a.load_rows(p, item, tile);
      a.clear();
      int read = 0;
      for (int base = from * kPlanTile; base < end; base += L::kStepTokens) {
        if constexpr (kBulk) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
          for (int s = 0; s < p.row_tiles; ++s)
            mbarrier_wait(
                ring + L::kBarriers + (stage * kDecodeWarps + team * p.row_tiles + s) * 8, parity);
#endif
        }
        if constexpr (!kBulk || F::kBytes == 1) cp_async_wait<L::kStages - 2>();
        if (p.row_tiles == 1)
          __syncwarp();
        else
          named_barrier(1 + team, 32 * p.row_tiles);
        stream.issue(stage == 0 ? L::kStages - 1 : stage - 1);
        for (int s = 0; s < p.row_tiles; ++s) {
          const int owner = team * p.row_tiles + s, first = base + owner * L::kTokens;
          if (first < end && first < item.last && first + L::kTokens > item.first)
            a.step(p, item, ring + (stage * kDecodeWarps + owner) * L::kSlice, first);
        }
        read = stage;
        if (++stage == L::kStages) stage = 0, parity ^= 1;
      }
      const Finish<A> merge{p, item, shared, shared + read * L::kStage};
      merge.run(a, cut_item(p, slot, walk, from));
      if constexpr (kBulk) clear_padding(read);
      from = to;
    }
  } while (walk.next(p, slot));
}

template <class F, int D, DecodePath kPath>
int launch_decode_instance(const DecodeParams& p, int slots, void* stream) {
  return launch(decode_kernel<F, D, kPath>, dim3(slots / p.lanes * p.lanes), dim3(kDecodeThreads), Layout<F, D>::kTotal,
                stream, p);
}

template <class F, DecodePath kPath>
int launch_decode_dim(const DecodeParams& p, int slots, void* stream) {
  if (p.dim <= 64) return launch_decode_instance<F, 64, kPath>(p, slots, stream);
  if (p.dim <= 128) return launch_decode_instance<F, 128, kPath>(p, slots, stream);
  return launch_decode_instance<F, 256, kPath>(p, slots, stream);
}

}  // namespace fastinfer::cuda
