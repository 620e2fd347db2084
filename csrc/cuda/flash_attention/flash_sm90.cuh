// Hopper kernel (sm_90a): TMA, wgmma, warp-specialised and persistent.
//
// One CTA per SM: a producer warpgroup and kGroups consumer warpgroups of 64 query rows each. Warp
// 1 of the producer deals out tiles of work, warp 0 loads Q and streams K and V tiles of kKeys keys
// through two rings of kStages buffers; the consumers hold S, P and O in registers.
//
//   S_j = Q K_j^T          runs together with   O += P_{j-1} V_{j-1}
//   softmax of S_j         runs under that product and, since the consumer groups take turns at
//                          issuing (named barriers), under the other group's products
//
// Keys go from the last visible tile to the first: masks come first and last, the tiles between
// need none. Tiles in shared memory are slabs of 64 columns, 128-byte swizzled, as TMA writes and
// wgmma reads them. Columns past head_dim are zeros from TMA. V rows that no row of the tile sees
// are overwritten with zeros before use (0 * NaN), K rows only give scores that are masked.
#pragma once

#include "../common/launch.cuh"
#include "../ptx/tma.cuh"
#include "../ptx/wgmma.cuh"
#include "flash_choice.h"
#include "flash_deal.cuh"
#include "flash_work.cuh"
#include "tensor_map.h"

namespace fastinfer::cuda::flash {

// Tile shape of a head dimension; the same for every call, so that bits never depend on lengths.
template <int kD>
struct Sm90Tile {
  static_assert(kD % 64 == 0 && kD <= 256, "whole slabs of 64 columns");
  static constexpr int kGroups = 2;
  static constexpr int kRows = 64 * kGroups;
  static constexpr int kKeys = sm90_keys(kD);
  static constexpr int kStages = kD <= 64 ? 4 : 2;
  static constexpr int kSlabs = kD / 64;
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr uint32_t kQBytes = kRows * kD * 2, kTileBytes = kKeys * kD * 2;
  static constexpr size_t kSharedBytes = kQBytes + 2 * kStages * kTileBytes + 1024 + 512;
  static_assert(kSharedBytes <= 227 * 1024, "shared memory of an SM");
  // What the block got at launch (65536 / kThreads, in eights) is all that there is to share out.
  static_assert(kProducerRegisters + kGroups * kConsumerRegisters <=
                    (kGroups + 1) * (65536 / kThreads / 8 * 8),
                "setmaxnreg would wait for ever");
};

// One unit of work as the consumers and the loader see it.
struct Slot {
  Work w;
  Range keys;
  int32_t valid;
};
constexpr int kSlots = 2;

template <int kStages>
struct Sm90Barriers {
  uint64_t q_full, q_empty;
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  uint64_t slot_full[kSlots], slot_empty[kSlots];
  Slot slots[kSlots];
};

// Position in a ring: buffer and the parity of its current use.
template <int kStages>
struct Ring {
  int index = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void next() {
    if (++index == kStages) {
      index = 0;
      phase ^= 1;
    }
  }
};

// The dealing warp: one slot after the other, until there is no more work.
template <int kRows, int kKeys, int kStages>
__device__ __forceinline__ void deal_work(const FlashAttentionParams& p,
                                          Sm90Barriers<kStages>& barriers, int64_t total) {
  Ring<kSlots> ring;
  SortedTiles<kRows, kKeys> sorted{p, 0};
  if (p.cu_q) sorted.start();
  for (int64_t round = 0;; ++round) {
    const int64_t place = round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const int64_t index = round * gridDim.x + place;
    Slot slot{};
    slot.valid = index < total;
    if (slot.valid && p.cu_q) {
      const int32_t rank = static_cast<int32_t>(index) / p.heads_q;
      slot.w.head = static_cast<int32_t>(index) - rank * p.heads_q;
      slot.valid = sorted.find(rank, slot.w);
    } else if (slot.valid) {
      slot.w = dense_work(p, index, kRows);
    }
    if (slot.valid) slot.keys = visible(p, slot.w, slot.w.row, kRows);
    ptx::mbarrier_wait(&barriers.slot_empty[ring.index], ring.phase ^ 1);
    if (threadIdx.x % 32 == 0) {
      barriers.slots[ring.index] = slot;
      ptx::mbarrier_arrive(&barriers.slot_full[ring.index]);
    }
    if (!slot.valid) return;
    ring.next();
  }
}

// The next unit of work, and back to the dealer when the warp has no more use for it. It stays in
// shared memory: the accumulators need the registers.
template <int kStages>
__device__ __forceinline__ const Slot& take_work(Sm90Barriers<kStages>& barriers,
                                                 const Ring<kSlots>& ring) {
  ptx::mbarrier_wait(&barriers.slot_full[ring.index], ring.phase);
  return barriers.slots[ring.index];
}
template <int kStages>
__device__ __forceinline__ void return_work(Sm90Barriers<kStages>& barriers, Ring<kSlots>& ring) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&barriers.slot_empty[ring.index]);
  ring.next();
}

// One K or V tile. Dense and packed: a box per slab. Paged: a box per slab and page; lane j looks
// after page j of the tile, and pages no row sees are not touched.
template <int kD>
struct TileLoader {
  using Tile = Sm90Tile<kD>;
  const FlashAttentionParams& p;
  uint64_t policy;

  __device__ __forceinline__ int32_t box_rows() const {
    return p.table && p.page_size < Tile::kKeys ? p.page_size : Tile::kKeys;
  }
  // Lane j: id of page j of the tile, or -1.
  __device__ __forceinline__ int32_t page_id(const Slot& slot, int32_t tile) const {
    const int32_t rows = box_rows(), j = threadIdx.x % 32;
    const int32_t key = tile * Tile::kKeys + j * rows;
    if (j * rows >= Tile::kKeys || key >= slot.keys.end || key + rows <= slot.keys.begin) return -1;
    return p.table[slot.w.batch * p.table_stride + key / p.page_size];
  }
  __device__ __forceinline__ void load(const CUtensorMap* map, uint32_t to, uint64_t* full,
                                       const Slot& slot, int32_t tile, int32_t kv_head,
                                       int32_t page) const {
    const int lane = threadIdx.x % 32;
    const int32_t key = tile * Tile::kKeys;
    if (!p.table) {
      if (lane != 0) return;
      ptx::mbarrier_arrive_expect(full, Tile::kTileBytes);
#pragma unroll
      for (int s = 0; s < Tile::kSlabs; ++s)
        ptx::tma_load(to + s * Tile::kKeys * 128, map, full, 64 * s, slot.w.start_k + key, kv_head,
                      p.cu_q ? 0 : slot.w.batch, policy);
      return;
    }
    const int32_t rows = box_rows();
    const unsigned here = __ballot_sync(kAllLanes, page >= 0);
    if (lane == 0) ptx::mbarrier_arrive_expect(full, __popc(here) * rows * kD * 2);
    __syncwarp();
    if (page < 0) return;
    const int32_t slot_row = (key + lane * rows) % p.page_size;
#pragma unroll
    for (int s = 0; s < Tile::kSlabs; ++s)
      ptx::tma_load(to + s * Tile::kKeys * 128 + lane * rows * 128, map, full, 64 * s, slot_row,
                    kv_head, page, policy);
  }
};

template <int kD, int kStages>
__device__ __forceinline__ void produce(const FlashAttentionParams& p, const CUtensorMap* q_map,
                                        const CUtensorMap* k_map, const CUtensorMap* v_map,
                                        Sm90Barriers<kStages>& barriers, uint32_t q_tile,
                                        uint32_t k_tiles, uint32_t v_tiles) {
  using Tile = Sm90Tile<kD>;
  const TileLoader<kD> loader{p, ptx::policy_evict_last()};
  const uint64_t q_policy = ptx::policy_evict_first();
  Ring<kSlots> work;
  Ring<kStages> k_ring, v_ring;
  uint32_t q_phase = 0;
  while (true) {
    const Slot& slot = take_work(barriers, work);
    if (!slot.valid) return;
    if (slot.keys.begin == slot.keys.end) {
      return_work(barriers, work);
      continue;
    }
    const int32_t first = slot.keys.begin / Tile::kKeys;
    const int32_t last = (slot.keys.end - 1) / Tile::kKeys;
    const int32_t kv_head = slot.w.head / p.group;
    int32_t page = -1;  // of the tile whose V comes next
    for (int32_t tile = last; tile >= first - 1; --tile) {
      int32_t next_page = -1;
      if (tile >= first) {
        if (p.table) next_page = loader.page_id(slot, tile);
        ptx::mbarrier_wait(&barriers.k_empty[k_ring.index], k_ring.phase ^ 1);
        loader.load(k_map, k_tiles + k_ring.index * Tile::kTileBytes,
                    &barriers.k_full[k_ring.index], slot, tile, kv_head, next_page);
        k_ring.next();
      }
      if (tile == last) {
        ptx::mbarrier_wait(&barriers.q_empty, q_phase ^ 1);
        q_phase ^= 1;
        if (threadIdx.x % 32 == 0) {
          ptx::mbarrier_arrive_expect(&barriers.q_full, Tile::kQBytes);
#pragma unroll
          for (int s = 0; s < Tile::kSlabs; ++s)
            ptx::tma_load(q_tile + s * Tile::kRows * 128, q_map, &barriers.q_full, 64 * s,
                          slot.w.start_q + slot.w.row, slot.w.head, p.cu_q ? 0 : slot.w.batch,
                          q_policy);
        }
        __syncwarp();
      } else {
        ptx::mbarrier_wait(&barriers.v_empty[v_ring.index], v_ring.phase ^ 1);
        loader.load(v_map, v_tiles + v_ring.index * Tile::kTileBytes,
                    &barriers.v_full[v_ring.index], slot, tile + 1, kv_head, page);
        v_ring.next();
      }
      page = next_page;
      __syncwarp();
    }
    return_work(barriers, work);
  }
}

template <class T, int kD, bool kModify>
struct Consumer {
  using Tile = Sm90Tile<kD>;
  static constexpr int kKeys = Tile::kKeys, kStages = Tile::kStages;

  const FlashAttentionParams& p;
  Sm90Barriers<kStages>& barriers;
  const uint32_t q_tile, k_tiles, v_tiles;
  const int group;  // which consumer group this is

  float out[kD / 2];
  uint32_t probabilities[kKeys / 4];
  RowState state;
  Ring<kStages> k_ring, v_ring;

  static __device__ __forceinline__ void release(uint64_t* barrier) {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier);
  }

  // S = Q K^T, not waited for.
  __device__ __forceinline__ void start_scores(float (&s)[kKeys / 2]) {
    const uint64_t q = ptx::slab_descriptor(q_tile + group * 64 * 128, 16);
    const uint64_t k = ptx::slab_descriptor(k_tiles + k_ring.index * Tile::kTileBytes, 16);
#pragma unroll
    for (int i = 0; i < kD / 16; ++i) {
      const int slab = i / 4, inside = i % 4 * 32;
      ptx::wgmma_ss<T, kKeys>(s, q + ((slab * Tile::kRows * 128 + inside) >> 4),
                              k + ((slab * kKeys * 128 + inside) >> 4), i > 0);
    }
    ptx::wgmma_commit();
  }
  // O += P V, not waited for.
  __device__ __forceinline__ void start_output(bool fresh) {
    const uint64_t v = ptx::slab_descriptor(v_tiles + v_ring.index * Tile::kTileBytes, kKeys * 128);
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i)
      ptx::wgmma_rs<T, kD>(out, probabilities + 4 * i, v + (i * 2048 >> 4), i > 0 || !fresh);
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void pack(const float (&s)[kKeys / 2]) {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) probabilities[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
  }

  // Softcap, ALiBi and masks on the scores of tile `tile`; `row`: this thread's first row; tiles in
  // `open` need no mask.
  __device__ __forceinline__ void treat(float (&s)[kKeys / 2], const Work& w, int32_t tile,
                                        Range open, int32_t row, float slope) {
    const int32_t column = tile * kKeys + 2 * (threadIdx.x % 4);
    if constexpr (kModify) {
      const int32_t shift = w.len_k - w.len_q;
      modify_scores(p, s, slope, column, row + shift, row + 8 + shift);
    }
    if (tile < open.begin || tile >= open.end) {
      const Range low = row_limits(p, w, row), high = row_limits(p, w, row + 8);
      mask_scores(s, column, low.begin, low.end, high.begin, high.end);
    }
  }
  // Tiles all of whose keys are seen by all rows of the group of 64 that starts at `top`.
  __device__ __forceinline__ Range open_tiles(const Work& w, int32_t top) const {
    return {(max(row_limits(p, w, top + 63).begin, 0) + kKeys - 1) / kKeys,
            max(row_limits(p, w, top).end, 0) / kKeys};
  }

  // Zeros in the rows of the current V tile that no row of the work sees. All consumers.
  __device__ __forceinline__ void clean_values(Range keys, int32_t tile) {
    const int32_t first = tile * kKeys;
    if (first >= keys.begin && first + kKeys <= keys.end) return;
    const uint32_t v = v_tiles + v_ring.index * Tile::kTileBytes;
    const int thread = threadIdx.x - 128;
    for (int i = thread; i < kKeys * kD / 8; i += 128 * Tile::kGroups) {
      const int32_t key = first + i / 8 % kKeys;
      if (key < keys.begin || key >= keys.end)
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(v + i * 16), "r"(0)
                     : "memory");
    }
    ptx::proxy_fence_shared();
    ptx::named_sync(kCleanBarrier, 128 * Tile::kGroups);
  }
  static constexpr uint32_t kTurnBarrier = 1, kCleanBarrier = 1 + Tile::kGroups;

  __device__ __forceinline__ void wait_turn() { ptx::named_sync(kTurnBarrier + group, 256); }
  __device__ __forceinline__ void pass_turn() {
    ptx::named_arrive(kTurnBarrier + (group + 1) % Tile::kGroups, 256);
  }

  // All tiles of keys for one tile of rows.
  __device__ __forceinline__ void attend(const Slot& slot, int32_t top, int32_t row, float factor,
                                         float slope, uint32_t q_phase) {
    const int32_t first = slot.keys.begin / kKeys, last = (slot.keys.end - 1) / kKeys;
    state = RowState{};
    float keep[2];
    float s[kKeys / 2];
    ptx::mbarrier_wait(&barriers.q_full, q_phase);
    ptx::mbarrier_wait(&barriers.k_full[k_ring.index], k_ring.phase);
    ptx::wgmma_fence();
    start_scores(s);
    ptx::wgmma_wait<0>();
    ptx::hold(s);
    release(&barriers.k_empty[k_ring.index]);
    k_ring.next();
    if (last == first) release(&barriers.q_empty);
    const Range open = open_tiles(slot.w, top);
    treat(s, slot.w, last, open, row, slope);
    state.update(s, factor, keep);
    pack(s);
    ptx::mbarrier_wait(&barriers.v_full[v_ring.index], v_ring.phase);
    clean_values(slot.keys, last);

    for (int32_t tile = last - 1; tile >= first; --tile) {
      ptx::mbarrier_wait(&barriers.k_full[k_ring.index], k_ring.phase);
      wait_turn();
      ptx::wgmma_fence();
      start_scores(s);
      ptx::mbarrier_wait(&barriers.v_full[v_ring.index], v_ring.phase);
      start_output(tile == last - 1);
      pass_turn();
      ptx::wgmma_wait<1>();
      ptx::hold(s);
      release(&barriers.k_empty[k_ring.index]);
      k_ring.next();
      if (tile == first) release(&barriers.q_empty);
      treat(s, slot.w, tile, open, row, slope);
      state.update(s, factor, keep);
      ptx::wgmma_wait<0>();
      ptx::hold(out);
      ptx::hold(probabilities);
      release(&barriers.v_empty[v_ring.index]);
      v_ring.next();
#pragma unroll
      for (int i = 0; i < kD / 2; ++i) out[i] *= keep[i % 4 / 2];
      pack(s);
    }
    ptx::mbarrier_wait(&barriers.v_full[v_ring.index], v_ring.phase);
    if (first < last) clean_values(slot.keys, first);
    ptx::wgmma_fence();
    start_output(first == last);
    ptx::wgmma_wait<0>();
    ptx::hold(out);
    ptx::hold(probabilities);
    release(&barriers.v_empty[v_ring.index]);
    v_ring.next();
  }

  __device__ __forceinline__ void run(bool packed_out) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const float factor = kModify ? 1.0f : p.scale * kLog2e;
    Ring<kSlots> work;
    uint32_t q_phase = 0;
    if (group == Tile::kGroups - 1) pass_turn();  // the first group goes first
    while (true) {
      const Slot& slot = take_work(barriers, work);
      if (!slot.valid) break;
      const Work& w = slot.w;
      const int32_t top = w.row + 64 * group, row = top + 16 * warp + lane / 4;
      const bool some = slot.keys.begin < slot.keys.end;
      if (some) {
        attend(slot, top, row, factor, kModify ? alibi_slope(p, w) : 0.0f, q_phase);
        q_phase ^= 1;
      } else {
        state = RowState{};  // whose finish() gives weight 0: `out` is not looked at
      }
      const int64_t batch = p.cu_q ? 0 : w.batch, start = w.start_q, head = w.head;
      const float sink = sink_logit(p, w.head);
      float weight[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float lse;
        weight[r] = state.finish(r, factor, p, sink, lse);
        if (p.lse && lane % 4 == 0 && row + 8 * r < w.len_q)
          p.lse[batch * p.lse_batch + head * p.lse_head + (start + row + 8 * r) * p.lse_token] =
              lse;
      }
      T* const to =
          static_cast<T*>(p.out) + batch * p.out_batch + head * p.out_head + start * p.out_token;
      store_rows<T, kD>(to, p.out_token, p.head_dim, packed_out, out, row, row + 8, w.len_q,
                        weight[0], weight[1]);
      return_work(barriers, work);
    }
  }
};

template <class T, int kD, bool kModify>
__global__ void __launch_bounds__(Sm90Tile<kD>::kThreads, 1)
    flash_sm90_kernel(const __grid_constant__ FlashAttentionParams p,
                      const __grid_constant__ CUtensorMap q_map,
                      const __grid_constant__ CUtensorMap k_map,
                      const __grid_constant__ CUtensorMap v_map, const int64_t total,
                      const bool packed_out) {
  using Tile = Sm90Tile<kD>;
  constexpr int kStages = Tile::kStages, kConsumerWarps = 4 * Tile::kGroups;
  extern __shared__ char raw[];
  const uint32_t base = (ptx::shared_address(raw) + 1023) & ~1023u;
  const uint32_t q_tile = base, k_tiles = q_tile + Tile::kQBytes;
  const uint32_t v_tiles = k_tiles + kStages * Tile::kTileBytes;
  auto& barriers = *reinterpret_cast<Sm90Barriers<kStages>*>(
      raw + (v_tiles + kStages * Tile::kTileBytes - ptx::shared_address(raw)));
  static_assert(sizeof(Sm90Barriers<kStages>) <= 512, "reserved in kSharedBytes");

  if (threadIdx.x == 0) {
    ptx::tma_prefetch(&q_map);
    ptx::tma_prefetch(&k_map);
    ptx::tma_prefetch(&v_map);
    ptx::mbarrier_init(&barriers.q_full, 1);
    ptx::mbarrier_init(&barriers.q_empty, kConsumerWarps);
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(&barriers.k_full[i], 1);
      ptx::mbarrier_init(&barriers.v_full[i], 1);
      ptx::mbarrier_init(&barriers.k_empty[i], kConsumerWarps);
      ptx::mbarrier_init(&barriers.v_empty[i], kConsumerWarps);
    }
    for (int i = 0; i < kSlots; ++i) {
      ptx::mbarrier_init(&barriers.slot_full[i], 1);
      ptx::mbarrier_init(&barriers.slot_empty[i], kConsumerWarps + 1);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  grid_wait();
  grid_launch_dependents();

  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    ptx::registers_give<Tile::kProducerRegisters>();
    const int warp = threadIdx.x / 32;
    if (warp == 0)
      produce<kD>(p, &q_map, &k_map, &v_map, barriers, q_tile, k_tiles, v_tiles);
    else if (warp == 1)
      deal_work<Tile::kRows, Tile::kKeys>(p, barriers, total);
  } else {
    ptx::registers_take<Tile::kConsumerRegisters>();
    Consumer<T, kD, kModify> consumer{p, barriers, q_tile, k_tiles, v_tiles, warpgroup - 1};
    consumer.run(packed_out);
  }
}

template <class T, int kD, bool kModify>
int launch_sm90(const FlashAttentionParams& p, void* stream) {
  using Tile = Sm90Tile<kD>;
  CUtensorMap q, k, v;
  const int64_t rows_q = p.cu_q ? p.tokens_q : p.len_q;
  const int64_t rows_k = p.table ? p.page_size : p.cu_q ? p.tokens_k : p.len_k;
  const int64_t outer = p.table ? p.num_pages : p.cu_q ? 1 : p.batch;
  const int64_t box = p.table && p.page_size < Tile::kKeys ? p.page_size : Tile::kKeys;
  int error = tensor_map(q, p.q, p.dtype, p.head_dim, rows_q, p.heads_q, p.cu_q ? 1 : p.batch,
                         p.q_token, p.q_head, p.q_batch, Tile::kRows);
  if (!error)
    error = tensor_map(k, p.k.data, p.dtype, p.head_dim, rows_k, p.heads_kv, outer, p.k.token,
                       p.k.head, p.k.page, box);
  if (!error)
    error = tensor_map(v, p.v.data, p.dtype, p.head_dim, rows_k, p.heads_kv, outer, p.v.token,
                       p.v.head, p.v.page, box);
  if (error) return error;
  const int64_t tiles = p.cu_q ? p.tokens_q / Tile::kRows + p.batch
                               : ceil_div(p.len_q, Tile::kRows) * int64_t{p.batch};
  const int64_t total = tiles * p.heads_q;
  const int64_t ctas = total < device_facts().sms ? total : device_facts().sms;
  return launch(flash_sm90_kernel<T, kD, kModify>, dim3(static_cast<unsigned>(ctas)),
                dim3(Tile::kThreads), Tile::kSharedBytes, stream, p, q, k, v, total,
                aligned16(p.out, {p.out_batch, p.out_token, p.out_head}));
}

}  // namespace fastinfer::cuda::flash
