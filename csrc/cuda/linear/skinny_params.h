// Parameters of the skinny kernel, its shared memory, and how a layer is dealt to CTAs: host side,
// pure.
#pragma once

#include <cstdint>

#include "../../cpu/dtype.h"

namespace fastinfer::cuda {

constexpr int kSkinnyThreads = 512, kSkinnyWarps = kSkinnyThreads / 32;
constexpr int kSkinnyRows = 64;        // of W per tile
constexpr int kSkinnyTokens = 32;      // at most per launch
constexpr int kPartialPitch = 68;      // floats per token: no bank conflicts for fragments of C
constexpr int kSkinnyZeroBytes = 128;  // what absent tokens read

struct SkinnyParams {
  const void* x;
  int64_t x_stride;
  const int32_t* perm;
  const void* w;  // packed words, or [N, K] of x's type
  int64_t w_stride;
  const void *scales, *zeros;
  DType scale_dtype, zero_dtype;
  void* out;
  int64_t out_stride;
  const void* bias;
  int m, n, k;
  int steps, tiles;  // blocks of 64 columns and of 64 rows
  int slice;         // columns blocks per rank, even
  int ranks, teams;  // CTAs that share a tile; teams take tiles in turn
  bool clustered;    // a team is a cluster; else partial sums go through `partial`
  bool x_packs;
  bool pair;        // one scale for two neighbouring column blocks
  int group_units;  // group size in units: 64 columns, or 8 in the generic kernel
  uint32_t group_magic;
  int groups;
  int block_groups;  // groups that a column block touches at most
  int slot_bytes, x_pitch;
  uint32_t* tickets;
  float* partial;  // [tiles][ranks][m][64]
};

// unit / group_units as a multiplication: exact while unit * group_units < 2^31.
constexpr uint32_t group_magic(int64_t units) {
  return static_cast<uint32_t>(((int64_t{1} << 31) + units - 1) / units);
}
constexpr int group_of(uint32_t unit, uint32_t magic) {
  return static_cast<int>((static_cast<uint64_t>(unit) * magic) >> 31);
}
static_assert(group_of(5, group_magic(1)) == 5 && group_of(8191, group_magic(3)) == 2730, "");

struct SkinnyShared {
  int x, ring, partial, sums, bytes;  // offsets
};

constexpr SkinnyShared skinny_shared(int m, int x_pitch, int stages, int slot_bytes,
                                     int column_parts, int buffers, bool shared_sums) {
  SkinnyShared s{};
  s.x = kSkinnyZeroBytes;
  s.ring = s.x + (m * x_pitch * 2 + 127) / 128 * 128;
  s.partial = s.ring + stages * kSkinnyWarps * slot_bytes;
  s.sums = s.partial + buffers * column_parts * m * kPartialPitch * 4;
  s.bytes = s.sums + (shared_sums ? 2 * m * kSkinnyRows * 4 : 0);
  return s;
}

// How many CTAs share the columns of a tile. `most_teams[i]`: clusters of 2^i CTAs that run at the
// same time; `fixed_bytes` shared memory beside x; a rank's columns are `slice` blocks.
struct SkinnySplit {
  int ranks, teams, slice;  // ranks = 0: x does not fit
};
constexpr SkinnySplit choose_skinny_split(int64_t tiles, int64_t steps, int block_bytes, int tokens,
                                          int64_t x_room, const int (&most_teams)[4]) {
  SkinnySplit best{};
  int64_t least = INT64_MAX;
  for (int i = 0; i < 4; ++i) {
    const int64_t ranks = int64_t{1} << i, most = most_teams[i];
    if (most == 0) continue;
    const int64_t slice = ((steps + ranks - 1) / ranks + 1) / 2 * 2;
    if (tokens * (slice * 64 + 32) * 2 > x_room) continue;
    const int64_t teams = tiles < most ? tiles : most;
    const int64_t rounds = (tiles + teams - 1) / teams;
    // In bytes of weights streamed: the end of a tile costs about as much as 4 KiB, with an
    // exchange between CTAs 6 KiB, once more at the end of the launch.
    const int64_t cost =
        rounds * (slice * block_bytes + (ranks > 1 ? 6144 : 4096)) + (ranks > 1 ? 8192 : 0);
    if (cost < least) {
      least = cost;
      best = {static_cast<int>(ranks), static_cast<int>(teams), static_cast<int>(slice)};
    }
  }
  return best;
}

}  // namespace fastinfer::cuda
