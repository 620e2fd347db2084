// The producer warpgroup of the sm_90a kernel: one warp deals out work, one loads Q, K and V.
#pragma once

#include "flash_deal.cuh"
#include "flash_sm90_tile.cuh"

namespace fastinfer::cuda::flash {

// The dealing warp: one slot after the other, until there is no more work.
template <class Tile>
__device__ __forceinline__ void deal_work(const FlashAttentionParams& p,
                                          Sm90Barriers<Tile>& barriers, int64_t total) {
  Ring<kSlots> ring;
  SortedTiles<Tile::kRows, Tile::kKeys> sorted{p, 0};
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
      slot.w = dense_work(p, static_cast<int32_t>(index), Tile::kRows);
    }
    if (slot.valid) slot.keys = visible(p, slot.w, slot.w.row, Tile::kRows);
    ptx::mbarrier_wait(&barriers.slot_empty[ring.index], ring.phase ^ 1);
    if (threadIdx.x % 32 == 0) {
      barriers.slots[ring.index] = slot;
      ptx::mbarrier_arrive(&barriers.slot_full[ring.index]);
    }
    if (!slot.valid) return;
    ring.next();
  }
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

template <int kD>
__device__ __forceinline__ void produce(const FlashAttentionParams& p, const CUtensorMap* q_map,
                                        const CUtensorMap* k_map, const CUtensorMap* v_map,
                                        Sm90Barriers<Sm90Tile<kD>>& barriers, uint32_t q_tile,
                                        uint32_t k_tiles, uint32_t v_tiles) {
  using Tile = Sm90Tile<kD>;
  const TileLoader<kD> loader{p, ptx::policy_evict_last()};
  const uint64_t q_policy = ptx::policy_evict_first();
  Ring<kSlots> work;
  Ring<Tile::kStages> k_ring, v_ring;
  uint32_t q_phase = 0;
  const int lane = threadIdx.x % 32;
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
        // Each group's rows for themselves: a group may be done with the tile before.
        for (int g = 0; g < Tile::kGroups; ++g) {
          ptx::mbarrier_wait(&barriers.q_empty[g], q_phase ^ 1);
          if (lane != 0) continue;
          ptx::mbarrier_arrive_expect(&barriers.q_full[g], Tile::kQBytes / Tile::kGroups);
#pragma unroll
          for (int s = 0; s < Tile::kSlabs; ++s)
            ptx::tma_load(q_tile + s * Tile::kRows * 128 + g * 64 * 128, q_map, &barriers.q_full[g],
                          64 * s, slot.w.start_q + slot.w.row + 64 * g, slot.w.head,
                          p.cu_q ? 0 : slot.w.batch, q_policy);
        }
        q_phase ^= 1;
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

}  // namespace fastinfer::cuda::flash
