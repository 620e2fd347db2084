// How a layer is dealt to the CTAs of the direct kernel (direct.cuh), and its shared memory: pure.
#pragma once

#include <cstdint>

namespace fastinfer::cuda {

constexpr int kDirectWarps = 16, kDirectStrips = 2;  // strips of a warp and round
constexpr int kDirectPitch = 20;  // floats of a token's 16 sums: no bank is met twice

struct DirectShared {
  int factors, partial, sums, bytes;  // offsets; x is at 0
};
#ifdef __CUDACC__
#define FI_BOTH_SIDES __host__ __device__
#else
#define FI_BOTH_SIDES
#endif
// What lies behind x: sums of a round's strips in two sets of buffers, and of `strips` strips, most
// of a team, where ranks exchange sums.
FI_BOTH_SIDES constexpr DirectShared with_sums(DirectShared s, int m, int row_shift, int strips) {
  const int buffers = 2 * (kDirectStrips << row_shift);
  s.sums = s.partial + buffers * (kDirectWarps >> row_shift) * m * kDirectPitch * 4;
  s.bytes = s.sums + strips * m * 64;
  return s;
}
// x in 16 bits.
FI_BOTH_SIDES constexpr DirectShared direct_shared(int m, int x_pitch, int row_shift, int strips) {
  DirectShared s{};
  s.partial = (m * x_pitch * 2 + 127) / 128 * 128;
  return with_sums(s, m, row_shift, strips);
}
// x in bytes: four a column, and factors of two tokens and 128 columns.
constexpr int kByteTokens = 2, kByteColumns = 16384;  // at most: making the bytes takes time
FI_BOTH_SIDES constexpr DirectShared byte_shared(int m, int pairs, int row_shift, int strips) {
  DirectShared s{};
  s.factors = m * pairs * 512;
  s.partial = s.factors + pairs * 32;
  return with_sums(s, m, row_shift, strips);
}
#undef FI_BOTH_SIDES

// Teams of 1 << rank_shift CTAs that share K; 1 << row_shift groups of warps that share the rows of
// a round.
struct DirectSplit {
  int rank_shift, row_shift, teams, x_pitch;  // teams = 0: x does not fit
  int bytes;
};

// in_bytes: for direct_bytes.cuh. most_teams[i]: clusters of 2^i CTAs that run at the same time;
// room: bytes of shared memory.
constexpr DirectSplit choose_direct_split(int64_t n, int64_t k, int m, int room,
                                          const int (&most_teams)[4], bool in_bytes = false) {
  const int64_t strips = (n + 15) / 16, pairs = (k + 127) / 128;
  DirectSplit best{};
  int64_t least = INT64_MAX;
  for (int i = 0; i < 4; ++i) {
    if (most_teams[i] == 0 || pairs < int64_t{1} << i) continue;
    const int64_t slice = (pairs + (1 << i) - 1) >> i;
    const int64_t teams = strips < most_teams[i] ? strips : most_teams[i];
    const int64_t deal = (strips + teams - 1) / teams;
    if (slice * (in_bytes ? 512 : 256) * m > room) continue;
    for (int r = 0; r < 3; ++r) {
      const int exchanged = i > 0 ? static_cast<int>(deal) : 0;
      const int pitch = static_cast<int>(in_bytes ? slice * 512 : slice * 128 + 8);
      const DirectShared at = in_bytes ? byte_shared(m, static_cast<int>(slice), r, exchanged)
                                       : direct_shared(m, pitch, r, exchanged);
      if (at.bytes > room) continue;
      // Bytes that the slowest warp has its multiprocessor wait for; x comes from the second-level
      // cache, at half the price, or is made into bytes; ends of rounds and the exchange of sums.
      const int64_t parts = kDirectWarps >> r, group = kDirectStrips << r,
                    rounds = (deal + group - 1) / group;
      const int64_t busy =
          rounds * ((slice + parts - 1) / parts) * kDirectWarps * kDirectStrips * 1024;
      const int64_t real = deal * slice * 1024;
      const int64_t exchange = i == 0 ? 0 : in_bytes ? 32 * 1024 + deal * 512 : 24 * 1024;
      const int64_t cost =
          (busy + real) / 2 + m * slice * (in_bytes ? 640 : 128) + rounds * 1024 + exchange;
      if (cost < least) {
        least = cost;
        best = {i, r, static_cast<int>(teams), pitch, at.bytes};
      }
    }
  }
  return best;
}

constexpr int kTeamsOfH100[4] = {132, 66, 30, 15};
constexpr bool direct_split_is(int64_t n, int64_t k, int m, int rank_shift, int row_shift,
                               bool in_bytes = false) {
  const DirectSplit s = choose_direct_split(n, k, m, 227 * 1024, kTeamsOfH100, in_bytes);
  return s.teams > 0 && s.rank_shift == rank_shift && s.row_shift == row_shift;
}
static_assert(direct_split_is(4096, 4096, 1, 0, 0), "two strips each");
static_assert(direct_split_is(6144, 4096, 1, 0, 1), "three: one round of four");
static_assert(direct_split_is(4096, 14336, 8, 1, 1), "x fits by halves");
static_assert(direct_split_is(8192, 28672, 8, 3, 2), "x fits by eighths");
static_assert(direct_split_is(4096, 4096, 1, 0, 0, true) &&
                  direct_split_is(28672, 4096, 2, 0, 0, true) &&
                  direct_split_is(57344, 8192, 1, 0, 1, true),
              "bytes of all columns");
static_assert(direct_split_is(4096, 14336, 1, 1, 1, true) &&
                  direct_split_is(10240, 8192, 2, 1, 0, true),
              "bytes of half the columns");
static_assert(choose_direct_split(8192, 65536, 8, 160 * 1024, {108, 0, 0, 0}).teams == 0,
              "x does not fit");

}  // namespace fastinfer::cuda
