// The sm_90a kernel's tile shapes, and what its warps hand to each other through shared memory.
#pragma once

#include "../ptx/tma.cuh"
#include "../ptx/wgmma.cuh"
#include "flash_choice.h"
#include "flash_work.cuh"

namespace fastinfer::cuda::flash {

// Tile shape of a head dimension. Keys per tile are the same for every call, so that bits never
// depend on lengths. kShort: one group of 64 rows, two CTAs per SM, for short sequences.
template <int kD, bool kShort = false>
struct Sm90Tile {
  static_assert(kD % 64 == 0 && kD <= 256, "whole slabs of 64 columns");
  static constexpr int kDim = kD;
  static constexpr int kCtasPerSm = kShort ? 2 : 1;
  static constexpr int kGroups = kShort ? 1 : 2;
  static constexpr int kRows = 64 * kGroups;
  static constexpr int kKeys = sm90_keys(kD);
  static constexpr int kStages = (kD <= 64 ? 4 : kD <= 128 ? 3 : 2) - kShort;  // of K
  static constexpr int kStagesV = kShort ? (kD <= 64 ? 2 : 1) : kD <= 64 ? 4 : 2;
  static constexpr int kStagesQ = kShort ? 1 : kD <= 64 ? 4 : kD <= 128 ? 2 : 1;
  // Units of work known at a time: one to be stored, one to work on, others to load for.
  static constexpr int kSlots = kStagesQ > 2 ? 5 : 3;
  static constexpr int kSlabs = kD / 64;
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = kShort ? 216 : 232;
  static constexpr uint32_t kQBytes = kRows * kD * 2, kTileBytes = kKeys * kD * 2;
  static constexpr size_t kSharedBytes =
      kStagesQ * kQBytes + (kStages + kStagesV) * kTileBytes + 768;
  // 1 KiB of every block is the system's.
  static_assert(kCtasPerSm * (kSharedBytes + 1024) <= 228 * 1024, "shared memory of an SM");
  // What the block got at launch (65536 / threads, in eights) is all that there is to share out.
  static_assert(kProducerRegisters + kGroups * kConsumerRegisters <=
                    (kGroups + 1) * (65536 / kCtasPerSm / kThreads / 8 * 8),
                "setmaxnreg would wait for ever");
};

// One unit of work as the consumers and the loader see it.
struct Slot {
  Work w;
  Range keys;
  Range open[2];  // of each group: the key tiles all of whose keys all of its rows see
  int32_t valid;
};
// Of a slot whose work is known.
template <class Tile>
__device__ __forceinline__ void set_keys(const FlashAttentionParams& p, Slot& slot) {
  slot.keys = visible(p, slot.w, slot.w.row, Tile::kRows);
  for (int g = 0; g < Tile::kGroups; ++g) {
    const int32_t top = slot.w.row + 64 * g;
    slot.open[g] = {(max(row_limits(p, slot.w, top + 63).begin, 0) + Tile::kKeys - 1) / Tile::kKeys,
                    max(row_limits(p, slot.w, top).end, 0) / Tile::kKeys};
  }
}

template <class Tile>
struct Sm90Barriers {
  uint64_t q_full[Tile::kStagesQ][Tile::kGroups], q_empty[Tile::kStagesQ][Tile::kGroups];
  uint64_t k_full[Tile::kStages], k_empty[Tile::kStages];
  uint64_t v_full[Tile::kStagesV], v_empty[Tile::kStagesV];
  uint64_t slot_full[Tile::kSlots], slot_empty[Tile::kSlots];
  Slot slots[Tile::kSlots];
  float pinned[Tile::kThreads / 32];  // written, never read; see Consumer::pin
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

// The next unit of work, and back to the dealer when the warp has no more use for it. It stays in
// shared memory: the accumulators need the registers.
template <class Tile>
__device__ __forceinline__ const Slot& take_work(Sm90Barriers<Tile>& barriers,
                                                 const Ring<Tile::kSlots>& ring) {
  ptx::mbarrier_wait(&barriers.slot_full[ring.index], ring.phase);
  return barriers.slots[ring.index];
}
template <class Tile>
__device__ __forceinline__ void return_slot(Sm90Barriers<Tile>& barriers, int index) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&barriers.slot_empty[index]);
}

}  // namespace fastinfer::cuda::flash
