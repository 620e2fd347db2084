// The producer warpgroup of the sm_90a kernel: one warp deals out work, one loads Q and K, one V.
#pragma once

#include "flash_deal.cuh"
#include "flash_sm90_tile.cuh"

namespace fastinfer::cuda::flash {

// The dealing warp: one slot after the other, until there is no more work.
template <class Tile>
__device__ __forceinline__ void deal_work(const FlashAttentionParams& p,
                                          Sm90Barriers<Tile>& barriers, int64_t total) {
  Ring<Tile::kSlots> ring;
  SortedTiles<Tile::kRows, Tile::kKeys> sorted{p, 0};
  if (p.cu_q) {
    sorted.start();
  } else {  // the first unit lies there already
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&barriers.slot_full[0]);
    ring.next();
  }
  for (int64_t round = p.cu_q ? 0 : 1;; ++round) {
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
    if (slot.valid) set_keys<Tile>(p, slot);
    ptx::mbarrier_wait(&barriers.slot_empty[ring.index], ring.phase ^ 1);
    if (threadIdx.x % 32 == 0) {
      barriers.slots[ring.index] = slot;
      ptx::mbarrier_arrive(&barriers.slot_full[ring.index]);
    }
    if (!slot.valid) return;
    ring.next();
  }
}

// One K or V tile. Dense and packed: a box per slab. Paged: a box per slab and p.box_rows keys of a
// page; lane j looks after keys [j, j + 1) * box_rows of the tile, and boxes no row sees are not
// loaded.
template <class Tile>
struct TileLoader {
  const FlashAttentionParams& p;
  uint64_t policy;

  // Lane j: id of the page that holds box j of the tile, or -1.
  __device__ __forceinline__ int32_t page_id(const Slot& slot, int32_t tile) const {
    const int32_t rows = p.box_rows, j = threadIdx.x % 32;
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
    const int32_t rows = p.box_rows;
    const unsigned here = __ballot_sync(kAllLanes, page >= 0);
    if (lane == 0) ptx::mbarrier_arrive_expect(full, __popc(here) * rows * Tile::kDim * 2);
    __syncwarp();
    if (page < 0) return;
    const int32_t slot_row = (key + lane * rows) % p.page_size;
#pragma unroll
    for (int s = 0; s < Tile::kSlabs; ++s)
      ptx::tma_load(to + s * Tile::kKeys * 128 + lane * rows * 128, map, full, 64 * s, slot_row,
                    kv_head, page, policy);
  }
};

// Key tiles of one unit of work, from the last to the first, into a ring; behind_first() runs
// once, behind the first tile. Block ids are fetched one tile ahead of the boxes that need them.
template <class Tile, int kStages, class F>
__device__ __forceinline__ void stream_tiles(const TileLoader<Tile>& loader, const CUtensorMap* map,
                                             uint32_t tiles, uint64_t* full, uint64_t* empty,
                                             Ring<kStages>& ring, const Slot& slot,
                                             F behind_first) {
  const int32_t first = slot.keys.begin / Tile::kKeys;
  const int32_t last = (slot.keys.end - 1) / Tile::kKeys;
  const int32_t kv_head = slot.w.head / loader.p.group;
  const bool paged = loader.p.table != nullptr;
  int32_t page = paged ? loader.page_id(slot, last) : -1;
  for (int32_t tile = last; tile >= first; --tile) {
    const int32_t next = paged && tile > first ? loader.page_id(slot, tile - 1) : -1;
    ptx::mbarrier_wait(&empty[ring.index], ring.phase ^ 1);
    loader.load(map, tiles + ring.index * Tile::kTileBytes, &full[ring.index], slot, tile, kv_head,
                page);
    ring.next();
    if (tile == last) behind_first();
    page = next;
    __syncwarp();  // lanes without a box must not run ahead to the next wait
  }
}

// The loading warps: one for Q and K, one for V, so that each has half of the boxes to issue. In
// short tiles the very first V waits until the first Q and K have been asked for: they are what
// everything waits for, and come in the order of the requests.
constexpr uint32_t kOrderBarrier = 8;

template <class Tile>
__device__ __forceinline__ void load_queries_and_keys(const FlashAttentionParams& p,
                                                      const CUtensorMap* q_map,
                                                      const CUtensorMap* k_map,
                                                      Sm90Barriers<Tile>& barriers, uint32_t q_tile,
                                                      uint32_t k_tiles) {
  const TileLoader<Tile> loader{p, ptx::policy_evict_last()};
  const uint64_t q_policy = ptx::policy_evict_first();
  Ring<Tile::kSlots> work;
  Ring<Tile::kStages> ring;
  Ring<Tile::kStagesQ> q_ring;
  bool begun = Tile::kCtasPerSm == 1;
  while (true) {
    const Slot& slot = take_work(barriers, work);
    if (!slot.valid) return;
    // Each group's rows for themselves: a group may be done with the tile before.
    auto load_queries = [&] {
      for (int g = 0; g < Tile::kGroups; ++g) {
        uint64_t* const full = &barriers.q_full[q_ring.index][g];
        ptx::mbarrier_wait(&barriers.q_empty[q_ring.index][g], q_ring.phase ^ 1);
        if (threadIdx.x % 32 != 0) continue;
        ptx::mbarrier_arrive_expect(full, Tile::kQBytes / Tile::kGroups);
        const uint32_t to = q_tile + q_ring.index * Tile::kQBytes + g * 64 * 128;
#pragma unroll
        for (int s = 0; s < Tile::kSlabs; ++s)
          ptx::tma_load(to + s * Tile::kRows * 128, q_map, full, 64 * s,
                        slot.w.start_q + slot.w.row + 64 * g, slot.w.head,
                        p.cu_q ? 0 : slot.w.batch, q_policy);
      }
      q_ring.next();
    };
    if (slot.keys.begin < slot.keys.end) {
      // With two buffers the rows come while the tile before is worked on. With one they have to
      // wait for the end of that; the first keys do not.
      if constexpr (Tile::kStagesQ > 1) load_queries();
      stream_tiles(loader, k_map, k_tiles, barriers.k_full, barriers.k_empty, ring, slot, [&] {
        if constexpr (Tile::kStagesQ == 1) load_queries();
        if (!begun) {
          __syncwarp();  // named barriers are for whole warps
          ptx::named_arrive(kOrderBarrier, 64);
        }
        begun = true;
      });
    }
    return_slot(barriers, work.index);
    work.next();
  }
}

template <class Tile>
__device__ __forceinline__ void load_values(const FlashAttentionParams& p, const CUtensorMap* v_map,
                                            Sm90Barriers<Tile>& barriers, uint32_t v_tiles) {
  const TileLoader<Tile> loader{p, ptx::policy_evict_last()};
  Ring<Tile::kSlots> work;
  Ring<Tile::kStagesV> ring;
  bool begun = Tile::kCtasPerSm == 1;
  while (true) {
    const Slot& slot = take_work(barriers, work);
    if (!slot.valid) return;
    const bool some = slot.keys.begin < slot.keys.end;
    if (some && !begun) {
      __syncwarp();
      ptx::named_sync(kOrderBarrier, 64);
    }
    begun = begun || some;
    if (some)
      stream_tiles(loader, v_map, v_tiles, barriers.v_full, barriers.v_empty, ring, slot, [] {});
    return_slot(barriers, work.index);
    work.next();
  }
}

}  // namespace fastinfer::cuda::flash
