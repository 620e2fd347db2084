// Decode attention: a few packed query rows per (sequence, key head) over a dense or paged cache.
//
//   o = softmax(scale q k^T, softcap, ALiBi, masks, sink) v
//
// Grid: one CTA per slot (params.h); where few keys fit the table, one cluster per part of an item
// (cluster_finish.cuh).
//
// A CTA of 4 warps (8: choose_large) works on one item at a time. row_tiles = 1, 2 or 4 warps form
// a team, one warp per 16 rows; the teams take different keys of a step of as many slices as there
// are warps and are merged at the end of a piece. Each warp loads one slice of every step
// (stream.cuh), reads all slices of its team (attend.cuh) and takes part in the merge (finish.cuh).
// No barrier of the CTA inside the loop.
#pragma once

#include <climits>

#include "../common/launch.cuh"
#include "cluster_finish.cuh"
#include "stream.cuh"

namespace fastinfer::cuda {

template <class P>
__device__ __forceinline__ Item make_item(const P& p, const Slot& slot, const Walk& walk) {
  Item item;
  item.b = walk.b;
  const int pair = walk.pair(p, slot);
  item.head = p.row_blocks == 1 ? pair : pair / p.row_blocks;
  item.row_block = pair - item.head * p.row_blocks;
  item.rows = min(p.rows - item.row_block * p.row_tiles * 16, p.row_tiles * 16);
  item.len = walk.len;
  item.first = item.low = walk.low;
  item.last = item.high = walk.len;
  int at_first = walk.len - p.q_len, at_last = at_first;
  if (p.q_len > 1) {
    const int first_row = item.row_block * p.row_tiles * 16;
    at_first += first_row / p.group;
    at_last += (first_row + item.rows - 1) / p.group;
  }
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

// What does not depend on the lengths sets out before they are there: a small block table to shared
// memory (true), part of a larger one and the queries to the L2 cache, where a kernel that is still
// writing them writes them, too.
template <class L, class P>
__device__ __forceinline__ bool start_loads(const P& p, uint32_t shared) {
  const int thread = (blockIdx.y * gridDim.x + blockIdx.x) * P::kThreads + threadIdx.x;
  if (thread * 128 < p.q_bytes)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(p.q) + thread * 128));
  if (!p.table) return false;
  if (p.entries <= L::kTableEntries) {
    const int packs = p.entries / 4, rest = p.entries % 4;
#pragma unroll 1
    for (int i = threadIdx.x; i < packs; i += P::kThreads)
      cp_async_16(shared + L::kTable + i * 16, p.table + i * 4, true);
    if (threadIdx.x < rest) {
      const int i = packs * 4 + threadIdx.x;
      cp_async_4(shared + L::kTable + i * 4, p.table + i, true);
    }
    cp_async_commit();
    return true;
  }
  const int64_t line = static_cast<int64_t>(thread) * 32;
  if (line < p.batch * p.table_stride && line < 32 * 4096)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p.table + line));
  return false;
}

// Values of a slice from row `first` on become zeros: a box brings what is behind the last key.
template <class L>
__device__ __forceinline__ void clear_values(uint32_t slice, int first) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int row = first + lane / 8; row < L::kTokens; row += 4)
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(slice + L::kV + row * L::kPitch +
                                                                  lane % 8 * 16),
                 "r"(0)
                 : "memory");
  ptx::proxy_fence_shared();
  __syncwarp();
}

template <class F, int D, bool kSoft, class L, class P>
__global__ void __launch_bounds__(P::kThreads, L::kCtasPerSm)
    decode_kernel(const __grid_constant__ P p) {
  using A = Attend<F, D, kSoft, L>;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t ring = shared_address(shared);
  const int warp = threadIdx.x / 32;

  uint64_t* const full = reinterpret_cast<uint64_t*>(shared + L::kFull);  // of boxes
  if constexpr (L::kBoxes) {
    if (threadIdx.x % 32 == 0) {
      ptx::tma_prefetch(&p.k_map);
      ptx::tma_prefetch(&p.v_map);
#pragma unroll
      for (int s = 0; s < L::kStages; ++s) ptx::mbarrier_init(full + s * P::kWarps + warp, 1);
      ptx::mbarrier_init_fence();
    }
    __syncwarp();
  }
  int length = first_length(p);
  const bool near = start_loads<L>(p, ring);
  asm volatile("" : "+r"(length));  // not used, which is to wait for it, any earlier
  const Slot slot = find_slot(p, length, reinterpret_cast<int*>(shared + L::kInts));
  if (!slot.works) {
    cp_async_wait<0>();
    grid_wait();
    return;
  }
  const bool clusters = P::kClusters && slot.parts > 0;
  Walk walk{};
  walk.start(p, slot);
  // The kernel right before this one may have written the newest keys, one per query: they are not
  // read before it is complete. Older keys, lengths, tables and the plan must have been complete
  // before this one could start, i.e. be written by a kernel further in front (launch.cuh). What
  // passes through L1 comes in sectors that may hold a new key's part as well: after the wait.
  int ahead = walk.tile * kPlanTile + (L::kStages - 1) * L::kStepTokens;
  if (ahead > walk.end * kPlanTile) {
    const bool goes_on = walk.position + walk.cost < slot.end;  // with the next item
    ahead = goes_on ? INT_MAX : walk.end * kPlanTile;
  }
  if (p.append > 0 || !p.packs || p.scale_per_token_k || p.scale_per_token_v ||
      ahead > walk.len - p.q_len)
    grid_wait();
  if (near) {
    cp_async_wait<0>();
    __syncthreads();
  }
  Stream<F, D, L, P> stream(p, slot, walk, ring, near);
#pragma unroll 1
  for (int s = -1; s < L::kStages - 1; ++s) {
    if (s >= 0) stream.issue(s, p.query_early);
    stream.look_up();
  }
  grid_wait();  // queries, output and workspace belong to kernels that may still run
  grid_launch_dependents();

  const int team = warp >> p.row_shift, tile = warp & (p.row_tiles - 1);
  A a;
  int stage = 0;
  [[maybe_unused]] uint32_t phase = 0;  // of `full`
#pragma unroll 1
  do {
    Item item = make_item(p, slot, walk);
    const bool empty = walk.len <= 0 && walk.position >= slot.begin;
#pragma unroll 1
    for (int from = walk.tile; from < walk.end || empty || clusters;) {  // or one empty piece
      int to = walk.end;
      if (p.invariant) to = min(to, (from / kInvariantTiles + 1) * kInvariantTiles);
      const int end = min(walk.len, to * kPlanTile);
      const Pieces pieces = clusters ? Pieces{} : cut_item(p, slot, walk, from);
      int read = stage == 0 ? L::kStages - 1 : stage - 1;  // nothing is under way to this one
      uint32_t query = L::kQueryInShared ? ring + L::kQuery : ring + read * L::kStage;
      float* unit = reinterpret_cast<float*>(shared + L::kStates);
      if (stream.fetched == walk.position) {
        cp_async_wait<L::kStages - 2>();
        query = ring + L::kFetched;
        stream.fetched = -1;
      } else {
        A::stage_query(p, item, query, unit);
        if constexpr (L::kBoxes) ptx::proxy_fence_shared();
      }
      __syncthreads();
      a.load_rows(p, item, tile, query, unit);
      __syncthreads();
      a.clear();
#pragma unroll 1
      for (int base = from * kPlanTile; base < end; base += L::kStepTokens) {
        if (!L::kBoxes || p.scale_per_token_k) cp_async_wait<L::kStages - 2>();
        if constexpr (L::kBoxes) ptx::mbarrier_wait(full + stage * P::kWarps + warp, phase);
        if (p.row_tiles == 1)
          __syncwarp();
        else
          named_barrier(1 + team, 32 * p.row_tiles);
        stream.issue(read, true);
        stream.look_up();
        const int joint = p.row_tiles == 1 ? 1 : A::kJoint;
#pragma unroll 1
        for (int s = 0; s < p.row_tiles; s += joint) {
          const int owner = team * p.row_tiles + s, first = base + owner * L::kTokens;
          const uint32_t slice = ring + (stage * P::kWarps + owner) * L::kSlice;
          if (first >= min(end, item.last) || first + joint * L::kTokens <= item.first) continue;
          if constexpr (L::kBoxes)
            if (first + L::kTokens > item.last) clear_values<L>(slice, item.last - first);
          if (A::kJoint == 1 || joint == 1)
            a.template step<1>(p, item, slice, first);
          else
            a.template step<A::kJoint>(p, item, slice, first);
        }
        read = stage;
        if (++stage == L::kStages) stage = 0, phase ^= 1;
      }
      const Finish<A, P> finish{p, item, shared, shared + read * L::kStage};
      const bool idle = to >= walk.end && walk.position + walk.cost >= slot.end;
      if constexpr (P::kClusters && Finish<A, P>::kRowThreads <= 32) {
        if (clusters) {
          ClusterFinish<A, P>{finish, p, slot}.run(a);
          return;
        }
      }
      finish.run(a, pieces, idle);
      from = to;
      if (empty) break;
    }
  } while (walk.next(p, slot));
}

// Which plain kernels there are beside that for blocks of 16 rows: for pairs of warps, in CTAs of 4
// or 8, and for scales per token. The compiler leaves most of the code out, and code has to be
// fetched, too.
template <class F, int D>
constexpr bool kPairs = F::kBytes == 2 && D <= 128;
template <class F, int D>
constexpr bool kLarge = F::kBf16 && D == 128;
template <class F, int D>
constexpr bool kPerToken = F::kBytes == 1 && D <= 128;

template <class F, int D, bool kSoft, class L, class P>
int launch_decode_kernel(const P& p, int ctas, void* stream) {
  dim3 grid(p.lanes, ctas / p.lanes);
  if (p.cluster_shift > 0 && p.most_share == kAlways)
    grid = dim3(1 << p.cluster_shift, p.batch * p.lanes << p.parts_shift);
  return launch_clusters(decode_kernel<F, D, kSoft, L, P>, 1 << p.cluster_shift, grid,
                         dim3(P::kThreads), L::kTotal, stream, p);
}

template <class F, int D, bool kSoft>
int launch_decode_instance(const DecodeParams& p, int ctas, void* stream) {
  using L = Layout<F, D>;
  if constexpr (kHasSmall<F, D>)
    if (L::kTotal > device_facts().shared_bytes)
      return launch_decode_kernel<F, D, kSoft, Layout<F, D, true>>(p, ctas, stream);
  if constexpr (!kSoft) {
    const bool plain = is_plain(p);
    if (plain && p.row_tiles == 1 && !p.scale_per_token_k)
      return launch_decode_kernel<F, D, kSoft, L>(PlainParams<1>{p}, ctas, stream);
    if constexpr (kPerToken<F, D>)
      if (plain && p.row_tiles == 1)
        return launch_decode_kernel<F, D, kSoft, L>(PlainParams<1, true>{p}, ctas, stream);
    if constexpr (kLarge<F, D>)
      if (plain && p.row_tiles == 2 && p.large)
        return launch_decode_kernel<F, D, kSoft, Layout<F, D, false, 32, false, 8>>(
            PlainParams<2, false, 8>{p}, ctas, stream);
    if constexpr (kPairs<F, D>)
      if (plain && p.row_tiles == 2)
        return launch_decode_kernel<F, D, kSoft, Layout<F, D, false, 32>>(PlainParams<2>{p}, ctas,
                                                                          stream);
  }
  return launch_decode_kernel<F, D, kSoft, L>(p, ctas, stream);
}

template <class F, bool kSoft = false>
int launch_decode_dim(const DecodeParams& p, int ctas, void* stream) {
  if (p.dim <= 64) return launch_decode_instance<F, 64, kSoft>(p, ctas, stream);
  if (p.dim <= 128) return launch_decode_instance<F, 128, kSoft>(p, ctas, stream);
  return launch_decode_instance<F, 256, kSoft>(p, ctas, stream);
}

}  // namespace fastinfer::cuda
