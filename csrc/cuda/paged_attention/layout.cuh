// Cache formats and the shared memory of the decode kernel.
//
// A warp's share of a step is a slice of 32 bytes' worth of keys per column: kTokens = 16 keys of a
// 16-bit cache, 32 of an 8-bit one. A slice holds their K rows, then their V rows, then (8-bit) two
// scales per key. Rows are padded by 16 bytes, an odd multiple of 16, so that ldmatrix meets no
// bank conflict. When a piece is finished a slice takes the warp's fp32 output for the merge.
#pragma once

#include "params.h"
#include "work.cuh"

namespace fastinfer::cuda {

struct FormatBf16 {
  static constexpr int kBytes = 1 * 2;
  static constexpr bool kBf16 = true, kE4m3 = false;
};
struct FormatF16 {
  static constexpr int kBytes = 2;
  static constexpr bool kBf16 = false, kE4m3 = false;
};
struct FormatE4m3 {
  static constexpr int kBytes = 1;
  static constexpr bool kBf16 = false, kE4m3 = true;
};
struct FormatI8 {
  static constexpr int kBytes = 1;
  static constexpr bool kBf16 = false, kE4m3 = false;
};

// kSmall: fewer stages, for GPUs that give a CTA 99 KiB (sm_86, 89, 120).
constexpr int kSmallShared = 99 * 1024;

// kRows: queries that come with the first keys of their item, 16 or 32. kInBoxes: rows of 128 bytes
// in the order in which TMA boxes of 16 keys leave them (128-byte swizzle: 16-byte segment c of row
// r is at c ^ r % 8), an mbarrier per slice. kWarps: of a CTA.
template <class F, int D, bool kSmall = false, int kRows = 16, bool kInBoxes = false,
          int kWarps = 4>
struct Layout {
  static constexpr bool kBoxes = kInBoxes;
  static_assert(!kBoxes || D * F::kBytes == 128, "a row of a box");
  static_assert(D == 64 || D == 128 || D == 256, "instances; other head dims run in the next one");
  static constexpr int kTokens = 32 / F::kBytes;
  static constexpr int kStepTokens = kWarps * kTokens;  // of a CTA
  static constexpr int kPitch = D * F::kBytes + (kBoxes ? 0 : 16);
  static constexpr int kV = kTokens * kPitch;
  static constexpr int kScales = 2 * kV;
  static constexpr int kSlice =
      kBoxes ? kScales + 1024 : kScales + (F::kBytes == 1 ? kTokens * 8 : 0);
  static constexpr int kStages = D == 64 ? (kSmall ? 4 : 5) : D == 128 ? (kSmall ? 2 : 3) : 2;
  static constexpr int kStage = kWarps * kSlice;
  static constexpr int kMergePitch = D + (F::kBytes == 1 ? 16 : 8);  // floats; no bank conflicts
  static_assert(16 * kMergePitch * 4 <= kSlice, "the merge buffer must fit into a slice");

  static constexpr bool kQueryInShared = D == 256;  // registers would not do
  static constexpr int kQuery = kStages * kStage;
  static constexpr int kQueryPitch = D * 2 + 16;
  static constexpr int kQueryBytes = kQueryInShared ? 64 * kQueryPitch : 0;
  static_assert(64 * kQueryPitch <= kStage, "the queries of a block must fit into a stage");
  static constexpr bool kFetches = F::kBytes == 2 && D <= 128;
  static constexpr int kFetchTiles = kRows / 16;
  static constexpr int kFetched = kQuery + kQueryBytes;
  static constexpr int kStates =
      kFetched + (kFetches ? kRows * kQueryPitch : 0);   // float2 [warp][16]
  static constexpr int kInts = kStates + kWarps * 128;   // int [kWarps + 4]
  static constexpr int kFull = kInts + 16 + kWarps * 4;  // mbarrier [stage][warp]
  static constexpr int kTable = kFull + (kBoxes ? kStages * kWarps * 8 : 0);  // a small one
  static constexpr int kTableEntries = F::kBytes == 1 && D == 128 && !kBoxes ? 256
                                       : kRows == 32 && D == 128             ? 448
                                                                             : 1024;
  static constexpr int kTotal = kTable + kTableEntries * 4;
  static_assert(!kSmall || kTotal <= kSmallShared, "the small layout must fit small GPUs");
  static constexpr int kCtasPerSm = D == 256 || kWarps == 8 ? 1 : 2;
  static_assert(kCtasPerSm * (kTotal + 1024) <= 228 * 1024, "shared memory of sm_90");
};

// Does this format and head dim have a small layout of its own? D = 256 cannot have one: its query
// and two stages take more.
template <class F, int D>
constexpr bool kHasSmall = Layout<F, D>::kTotal > kSmallShared&& D < 256;

}  // namespace fastinfer::cuda
