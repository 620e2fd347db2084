// The wgmma kernel for packed weights: parameters, tile, shared memory, order of the work, and the
// two threads that load X and the weights.
#pragma once

#include "../common/launch.cuh"
#include "../ptx/bulk.cuh"
#include "tensor_maps.h"
#include "wide.h"

namespace fastinfer::cuda::wide {

struct WideParams {
  const uint32_t* qweight;
  const void* scales;
  const uint8_t* zeros;
  DType scale_dtype;
  void* out;
  int64_t out_stride;
  const void* bias;
  int32_t m, n;
  int32_t steps;        // of 64 columns
  int32_t blocks;       // of 64 weight rows
  int32_t tile_blocks;  // of a tile: Tile::kAllBlocks or a few less
  int32_t group_steps;  // of a group; 1 with two groups to a step
  int32_t row_tiles, token_tiles, section;
  int32_t first_tile, end_tile;  // of this launch
  bool split;                    // the CTAs of a cluster cut K
  bool half_steps;               // groups of 32 columns
  bool packed_out;               // 16-byte stores fit
};

constexpr uint32_t kSumUnitBytes = 64 * 16 * 4;

template <int kBits_, int kTokens_, int kBlocks_, int kGroups_, bool kHalf_>
struct WideTile {
  static constexpr bool kHalf = kHalf_;
  static constexpr int kBits = kBits_, kTokens = kTokens_, kBlocks = kBlocks_;
  static constexpr int kGroups = kGroups_, kThreads = 128 * (kGroups + 1);
  static constexpr int kAllBlocks = kGroups * kBlocks;
  static constexpr int kAccumulators = kTokens / 2;  // of a thread and block
  static constexpr bool kScratch = !kHalf && kBlocks * kAccumulators <= 64;
  static constexpr uint32_t kXBytes = kTokens * 128, kBlockBytes = 512 * kBits;
  static constexpr uint32_t kWBytes = kAllBlocks * kBlockBytes;
  // Tiles may have less than kAllBlocks: the last warpgroup one of two.
  static constexpr bool kPartial =
      kBits == 4 && (kTokens == 16 || (kTokens == 32 && kGroups == 2)) && kBlocks == 2;
  static constexpr bool kHalves = kTokens <= (kBits == 8 ? 32 : 16);  // wide_sm90_multiply.cuh
  // 64 rows per block; two groups (of 32 columns) per step in some tiles (linear_choice.h).
  static constexpr int kStepGroups = kTokens == 64 || kTokens == 256 ? 2 : 1;
  static constexpr uint32_t kScaleGroup = kAllBlocks * 64 * 4, kZeroGroup = kAllBlocks * 64;
  static constexpr uint32_t kStageBytes =
      kXBytes + kWBytes + kStepGroups * (kScaleGroup + kZeroGroup);
  // [64 tokens][64 rows] per warpgroup
  static constexpr uint32_t kOutGroup = (kTokens < 64 ? kTokens : 64) * 128;
  static constexpr uint32_t kOutBytes = kGroups * kOutGroup;
  // Sums of the CTAs of a cluster, in units of 64 rows x 16 tokens: beside the ring where they are
  // few, else where the ring was.
  static constexpr int kUnits = kTokens / 16, kSumUnits = kAllBlocks * kUnits;
  static constexpr bool kSumsInRing = kTokens >= 64 || (kBits == 8 && kAllBlocks > 6);
  // Units that a CTA of `ranks` has room for.
  static constexpr int sum_units(int units, int ranks) {
    return (units + ranks - 1) / ranks * ranks;
  }
  static constexpr int most_sum_units() {
    int most = 0;
    for (int r = 2; r <= 8; ++r)
      if (sum_units(kSumUnits, r) > most && sum_units(kSumUnits, r) <= 20)
        most = sum_units(kSumUnits, r);
    return most;
  }
  static constexpr uint32_t kSumBytes = kSumsInRing ? 0 : most_sum_units() * kSumUnitBytes;
  static constexpr uint32_t kFixedBytes = kOutBytes + kSumBytes + 1024 + 512;
  static constexpr int kFit = (227 * 1024 - kFixedBytes) / kStageBytes;
  static constexpr int kMost = kTokens < 64 ? 12 : 8;  // few tokens: memory decides
  static constexpr int kStages = kFit < kMost ? kFit : kMost;
  static constexpr size_t kSharedBytes = kStages * kStageBytes + kFixedBytes;
  static constexpr uint32_t kSumRoom = kSumsInRing ? kStages * (kXBytes + kWBytes) : kSumBytes;
  static_assert(kStages >= 4 && sum_units(kSumUnits, 2) * kSumUnitBytes <= kSumRoom,
                "sums of two CTAs");
  static_assert(kTokens <= 32 || (kTokens % 64 == 0 && kTokens <= 256), "whole chunks of tokens");
  static constexpr int kProducerRegisters = kGroups == 2 ? 56 : 40;
  static constexpr int kConsumerRegisters = kGroups == 2 ? 224 : kGroups == 3 ? 152 : 104;
};

template <class Tile>
struct WideShared {
  uint32_t x, w, scales, zeros, out, sums;
  uint64_t *full, *empty, *summed;

  __device__ __forceinline__ explicit WideShared(char* raw) {
    const uint32_t start = ptx::shared_address(raw);
    x = (start + 1023) & ~1023u;
    w = x + Tile::kStages * Tile::kXBytes;
    out = w + Tile::kStages * Tile::kWBytes;
    sums = Tile::kSumsInRing ? x : out + Tile::kOutBytes;
    scales = out + Tile::kOutBytes + Tile::kSumBytes;
    zeros = scales + Tile::kStages * Tile::kStepGroups * Tile::kScaleGroup;
    const uint32_t barriers = zeros + Tile::kStages * Tile::kStepGroups * Tile::kZeroGroup;
    full = reinterpret_cast<uint64_t*>(raw + (barriers - start));
    empty = full + Tile::kStages;
    summed = empty + Tile::kStages;
  }
};

template <int kStages>
struct Ring {
  int index = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void next() {
    if (++index == kStages) index = 0, phase ^= 1;
  }
};

// One tile of work and this CTA's part of K.
struct Job {
  int32_t block, token;  // first block of 64 rows, first token
  int32_t begin, end;    // steps
};

template <class Tile>
__device__ __forceinline__ Job job_of(const WideParams& p, int32_t tile, int32_t rank,
                                      int32_t ranks) {
  const int32_t section = tile / (p.section * p.row_tiles), first = section * p.section;
  const int32_t inside = tile - first * p.row_tiles, width = min(p.section, p.token_tiles - first);
  Job job{inside / width * p.tile_blocks, (first + inside % width) * Tile::kTokens, 0, p.steps};
  if (p.split) {
    job.begin = static_cast<int32_t>(int64_t{p.steps} * rank / ranks);
    job.end = static_cast<int32_t>(int64_t{p.steps} * (rank + 1) / ranks);
  }
  return job;
}

// Walks the steps of a job: whether new scales come with the step.
struct GroupWalk {
  int32_t left;  // steps of the current group still to come
  __device__ __forceinline__ GroupWalk() : left(0) {}
  __device__ __forceinline__ bool starts(const WideParams& p, const Job& job, int32_t step) {
    const bool yes = left == 0;
    if (yes) left = p.group_steps - (step == job.begin ? step % p.group_steps : 0);
    --left;
    return yes;
  }
};
// A step with two groups, the second one not all padding.
__device__ __forceinline__ bool two_groups(const WideParams& p, int32_t step, int32_t k) {
  return p.half_steps && step * 64 + 32 < k;
}

// The producers are one thread each: what they issue is uniform, and their instructions are few, so
// that a step costs less than its products.
template <class Tile>
__device__ __forceinline__ void produce_x(const WideParams& p, const CUtensorMap* map,
                                          const WideShared<Tile>& shared, int32_t rank,
                                          int32_t ranks) {
  const uint64_t policy = ptx::policy_evict_last();
  Ring<Tile::kStages> ring;
  for (int32_t tile = p.first_tile + blockIdx.x / ranks; tile < p.end_tile;
       tile += gridDim.x / ranks) {
    const Job job = job_of<Tile>(p, tile, rank, ranks);
#pragma unroll 1
    for (int32_t step = job.begin; step < job.end; ++step, ring.next()) {
      uint64_t* const full = &shared.full[ring.index];
      ptx::mbarrier_wait(&shared.empty[ring.index], ring.phase ^ 1);
      ptx::mbarrier_arrive_expect(full, Tile::kXBytes);
      ptx::tma_load(shared.x + ring.index * Tile::kXBytes, map, full, step * 64, job.token, 0, 0,
                    policy);
    }
  }
}

// Codes, scales and zeros. Never waits for the kernel in front: those are weights.
template <class Tile>
__device__ __forceinline__ void produce_weights(const WideParams& p, const CUtensorMap* map,
                                                int32_t k, const WideShared<Tile>& shared,
                                                int32_t rank, int32_t ranks) {
  const uint64_t policy = p.token_tiles > 1 ? ptx::policy_evict_last() : ptx::policy_evict_first();
  const uint32_t scale_size = p.scale_dtype == DType::f32 ? 4 : 2;
  const uint32_t word_bytes = p.tile_blocks * Tile::kBlockBytes;
  Ring<Tile::kStages> ring;
  for (int32_t tile = p.first_tile + blockIdx.x / ranks; tile < p.end_tile;
       tile += gridDim.x / ranks) {
    const Job job = job_of<Tile>(p, tile, rank, ranks);
    const int32_t valid = min(p.tile_blocks, p.blocks - job.block);
    const uint32_t scale_bytes = valid * 64 * scale_size, zero_bytes = p.zeros ? valid * 64 : 0;
    GroupWalk walk;
    int64_t entry =
        (static_cast<int64_t>(p.half_steps ? 2 * job.begin : job.begin / p.group_steps) * p.blocks +
         job.block) *
        64;
#pragma unroll 1
    for (int32_t step = job.begin; step < job.end; ++step, ring.next()) {
      uint64_t* const full = &shared.full[ring.index];
      const int groups = walk.starts(p, job, step) ? 1 + two_groups(p, step, k) : 0;
      ptx::mbarrier_wait(&shared.empty[ring.index], ring.phase ^ 1);
      ptx::mbarrier_arrive_expect(full, word_bytes + groups * (scale_bytes + zero_bytes));
      ptx::tma_load(shared.w + ring.index * Tile::kWBytes, map, full, 0, step * (Tile::kBits / 4),
                    job.block, 0, policy);
#pragma unroll 1
      for (int g = 0; g < groups; ++g, entry += int64_t{p.blocks} * 64) {
        ptx::bulk_load(shared.scales + (Tile::kStepGroups * ring.index + g) * Tile::kScaleGroup,
                       static_cast<const char*>(p.scales) + entry * scale_size, scale_bytes, full,
                       policy);
        if (p.zeros)
          ptx::bulk_load(shared.zeros + (Tile::kStepGroups * ring.index + g) * Tile::kZeroGroup,
                         p.zeros + entry, zero_bytes, full, policy);
      }
    }
  }
}

}  // namespace fastinfer::cuda::wide
