// Parameters of the skinny kernel, its shared memory, and how a layer is dealt to CTAs: pure.
#pragma once

#include <cstdint>

#include "../../cpu/dtype.h"

#ifdef __CUDACC__
#define FI_BOTH __host__ __device__
#else
#define FI_BOTH
#endif

namespace fastinfer::cuda {

constexpr int kSkinnyTokens = 16;      // at most per launch
constexpr int kSkinnyRanks = 8;        // at most share a tile
constexpr int kSkinnyZeroBytes = 256;  // what absent tokens read

// Rows of W in strips of 16: full rounds of kStrips strips per team, neighbours to neighbours, and
// what is left as evenly as 1, 2 or kStrips strips to a team allow.
struct SkinnyDeal {
  int full, rest, each, per_tile;
};
constexpr SkinnyDeal skinny_deal(int strips, int teams, int per_tile) {
  const int full = strips / (per_tile * teams), rest = strips - full * per_tile * teams;
  int each = 1;
  while (each * teams < rest) each *= 2;
  return {full, rest, each, per_tile};
}
struct SkinnyTile {
  int strip, count;  // count = 0: no tile in this round
};
FI_BOTH constexpr SkinnyTile skinny_tile(const SkinnyDeal& deal, int teams, int team, int round) {
  if (round < deal.full) return {(round * teams + team) * deal.per_tile, deal.per_tile};
  if (round > deal.full) return {0, 0};
  const int first = team * deal.each, left = deal.rest - first;
  return {deal.full * deal.per_tile * teams + first, left < 0           ? 0
                                                     : left < deal.each ? left
                                                                        : deal.each};
}
static_assert(skinny_tile(skinny_deal(384, 132, 2), 132, 131, 0).strip == 262, "6144 rows");
static_assert(skinny_tile(skinny_deal(384, 132, 2), 132, 119, 1).strip == 383, "single ones");
static_assert(skinny_tile(skinny_deal(384, 132, 2), 132, 120, 1).count == 0, "for some");
static_assert(skinny_tile(skinny_deal(3, 2, 2), 2, 1, 0).count == 1, "");

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
  int steps, tiles;              // blocks of 64 columns, of 64 rows
  int slice;                     // column blocks per rank, even; of direct kernels pairs of them
  int ranks, rank_shift, teams;  // CTAs that share a tile, a power of two; teams take turns
  int row_shift;                 // warps split a tile in 1 << row_shift parts of rows
  bool clustered;                // a team is a cluster; else partial sums go through `partial`
  bool x_packs, weights_first;
  bool x_half;      // x, out and bias are fp16, else bf16 (where the kernel is for both)
  bool pair;        // one scale for two neighbouring column blocks
  int group_units;  // group size in units: 64 columns, or 8 in the generic kernel
  uint32_t group_magic;
  int groups;
  int slot_bytes, x_pitch;
  SkinnyDeal deal;
  uint32_t* tickets;  // one per strip
  float* partial;     // [strips][ranks][m][rows of a tile]
  uint32_t nothing;   // 0, which the compiler does not know
};

// unit / group_units as a multiplication: exact while unit * group_units < 2^31.
constexpr uint32_t group_magic(int64_t units) {
  return static_cast<uint32_t>(((int64_t{1} << 31) + units - 1) / units);
}
FI_BOTH constexpr int group_of(uint32_t unit, uint32_t magic) {
  return static_cast<int>((static_cast<uint64_t>(unit) * magic) >> 31);
}
static_assert(group_of(5, group_magic(1)) == 5 && group_of(8191, group_magic(3)) == 2730, "");

struct SkinnyShared {
  int x, ring, partial, sums, bytes;  // offsets
};

// rows: of a warp's part of a tile.
FI_BOTH constexpr SkinnyShared skinny_shared(int m, int x_pitch, int warps, int stages,
                                             int slot_bytes, int rows, int token_tiles,
                                             int exchanged_rows) {
  SkinnyShared s{};
  const int tokens = m < 8 ? m : 8;  // summed at a time
  s.x = kSkinnyZeroBytes;
  s.ring = s.x + (m * x_pitch * 2 + 127) / 128 * 128;
  s.partial = s.ring + stages * warps * slot_bytes;
  s.sums = s.partial + (token_tiles == 1 ? 2 : 1) * warps * tokens * (rows + 4) * 4;
  s.bytes = s.sums + 2 * m * exchanged_rows * 4;
  return s;
}

// How many CTAs share the columns of a tile. most_teams[i]: clusters of 2^i CTAs that run at the
// same time; x_room: bytes for x.
struct SkinnySplit {
  int ranks, teams, slice;  // ranks = 0: x does not fit
};
constexpr SkinnySplit choose_skinny_split(int64_t strips, int64_t steps, int strip_bytes, int rows,
                                          int tokens, int64_t x_room, const int (&most_teams)[4]) {
  SkinnySplit best{};
  int64_t least = INT64_MAX;
  for (int i = 0; i < 4; ++i) {
    const int64_t ranks = int64_t{1} << i, most = most_teams[i];
    if (most == 0) continue;
    const int64_t slice = ((steps + ranks - 1) / ranks + 1) / 2 * 2;
    // x, and where ranks exchange their sums; a tile of few columns has up to 4 * rows rows.
    const int64_t room = x_room - (ranks > 1 ? 2 * tokens * rows * (slice < 64 ? 16 : 4) : 0);
    if (tokens * (slice * 64 + 32) * 2 > room) continue;
    const int64_t teams = strips < most ? strips : most;
    const int64_t rounds = (strips + teams - 1) / teams;
    // Bytes of weights in the time of the busiest CTA; warps take 2 blocks in turn, so that a
    // share below 32 leaves some idle. Ends of tiles count as 2 KiB, exchanges as 2 more.
    const int64_t busy = (slice + 31) / 32 * 32;
    const int64_t cost = rounds * ((slice + busy) / 2 * strip_bytes + (ranks > 1 ? 4096 : 2048)) +
                         (ranks > 1 ? 16384 : 0);
    if (cost < least) {
      least = cost;
      best = {static_cast<int>(ranks), static_cast<int>(teams), static_cast<int>(slice)};
    }
  }
  return best;
}

}  // namespace fastinfer::cuda
