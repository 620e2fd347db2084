// Which kernel serves a packed linear on CUDA, and the tile of the wgmma one: pure host code. Only
// sizes and types take part, never values.
#pragma once

#include "../cpu/dtype.h"
#include "linear_layout.h"

namespace fastinfer {

enum class LinearKernel {
  skinny,      // mma.sync, weights streamed once per pass of tokens
  wide,        // wgmma, weights dequantised in registers (sm_90a)
  dequantise,  // weights to a 16-bit (fp32 for fp32 x) scratch, then torch's matrix product
};
enum class ZeroKind { none, integer, floating };

struct PackedCall {
  int arch;  // 90: the sm_90a kernel exists
  DType dtype;
  int bits;
  int64_t m, n, k;
  int64_t group_columns;  // at least k: one group
  ZeroKind zeros;
  bool batch_invariant;
  bool half = false;  // 4 bit with scales of x's type
  bool perm = false;  // columns of x in another order: the wgmma kernel needs them gathered first
};

// Groups that begin where a step of 64 columns does, or two to a step.
constexpr bool groups_suit_wide(int64_t group_columns, int64_t k) {
  return group_columns >= k || group_columns % 64 == 0 || group_columns == 32;
}

constexpr LinearKernel choose_packed_kernel(const PackedCall& c) {
  if (c.dtype == DType::f32) return LinearKernel::dequantise;
  if (c.batch_invariant || c.k == 0) return LinearKernel::skinny;
  const bool wide =
      c.arch == 90 && groups_suit_wide(c.group_columns, c.k) && c.zeros != ZeroKind::floating;
  // From 9 tokens on the skinny kernel is the slower one, with 8 bits from 6 on. At 256 tokens
  // scales of another type cost more.
  const bool half_steps = c.group_columns == 32 && c.group_columns < c.k;
  const int64_t few = !wide ? 256 : c.perm ? 16 : c.bits == 8 && !half_steps ? 5 : 8;
  if (c.m <= few) return LinearKernel::skinny;
  return wide && (c.half || c.m <= 3072) ? LinearKernel::wide : LinearKernel::dequantise;
}

// Tile of the wgmma kernel: tokens x (64 * tile_blocks) rows; `groups` warpgroups of `blocks`
// blocks of 64 rows, of which the last may lack one. Tiles beyond whole rounds over the
// multiprocessors are given to clusters of `split` CTAs that cut K.
struct WideChoice {
  int tokens, blocks, groups, tile_blocks, split;
};

// What a tile costs, in nanoseconds, fitted to an H200 (1 to 4 % rms, 256 tokens 8 to 11 %;
// docs/kernels/linear.md): a step of 64 columns; start and end of a tile; the same of a tile whose
// K is cut, and per CTA of it.
struct WideCost {
  int tokens, blocks, groups, less;  // less: blocks that the last warpgroup lacks
  int step, round, cut, rank;
};
constexpr int kWideLaunch = 1800;
constexpr int64_t kBytesPerMicrosecond = 4200000;
// 4 bit with scales of x's type, and others; 8 bit.
constexpr WideCost kWideHalf[] = {
    {16, 2, 3, 0, 498, 1661, 2654, 116}, {16, 2, 3, 1, 478, 1509, 2631, 88},
    {16, 2, 4, 0, 613, 2190, 3202, 83},  {16, 2, 4, 1, 580, 2025, 2989, 90},
    {32, 2, 2, 0, 430, 1909, 3159, 113}, {32, 2, 2, 1, 397, 1371, 2788, 43},
    {32, 2, 3, 0, 560, 3535, 3539, 111}, {64, 2, 2, 0, 518, 2334, 4599, 191},
    {64, 1, 3, 0, 464, 1441, 3918, 79},  {128, 1, 2, 0, 446, 1097, 4490, 37},
    {128, 1, 3, 0, 559, 3171, 6132, 8},  {256, 1, 2, 0, 651, 1996, 6562, 1495},
};
constexpr WideCost kWideExact4[] = {
    {16, 2, 3, 0, 498, 1661, 2654, 116}, {16, 2, 3, 1, 478, 1509, 2631, 88},
    {16, 2, 4, 0, 613, 2190, 3202, 83},  {16, 2, 4, 1, 580, 2025, 2989, 90},
    {32, 2, 2, 0, 430, 1909, 3159, 113}, {32, 2, 2, 1, 397, 1371, 2788, 43},
    {32, 2, 3, 0, 560, 3535, 3539, 111}, {64, 2, 2, 0, 518, 2334, 4599, 191},
    {64, 1, 3, 0, 464, 1441, 3918, 79},  {256, 1, 2, 0, 718, 1532, 6427, 1115},
};
constexpr WideCost kWideExact8[] = {
    {16, 1, 4, 0, 470, 3300, 2700, 200},   {16, 2, 4, 0, 790, 5229, 5000, 300},
    {32, 2, 2, 0, 525, 2857, 3335, 146},   {32, 2, 3, 0, 720, 5000, 4000, 150},
    {64, 2, 2, 0, 735, 3079, 4413, 408},   {128, 1, 2, 0, 545, 1205, 4019, 502},
    {256, 1, 2, 0, 701, 2924, 7975, 1352},
};

// CTAs of clusters that run at the same time: what does not fill a GPC stays idle.
constexpr int64_t clustered_sms(int split, int64_t sms) {
  if (split <= 2) return sms;
  const int64_t of_66 = split % 4 == 0 ? 60 : split == 5 ? 55 : split == 6 ? 48 : 54;
  return sms * of_66 / 66;
}

// The candidate whose last CTA is done first.
template <int kCount>
constexpr WideChoice choose_wide(const WideCost (&costs)[kCount], int bits, int64_t m, int64_t n,
                                 int64_t k, int64_t sms, bool half_steps, bool bf16) {
  WideChoice best{};
  int64_t least = INT64_MAX;
  const int64_t steps = div_up(k, 64);
  for (const WideCost& t : costs) {
    if (t.tokens < 64 && m > t.tokens) continue;                    // those are for a single pass
    if (half_steps && t.tokens != 64 && t.tokens != 256) continue;  // others take one group a step
    if (!bf16 && bits == 4 && t.groups == 3 && t.tokens > 16) continue;  // bf16 only
    const int tile_blocks = t.blocks * t.groups - t.less;
    const int64_t tiles = div_up(n, 64 * tile_blocks) * div_up(m, t.tokens), rest = tiles % sms;
    // After many rounds the last one hardly counts.
    const bool can_cut = rest > 0 && tiles < 4 * sms;
    // A step of `ctas` of them, in nanoseconds: nothing comes faster than memory.
    const auto step = [&](int64_t ctas) {
      const int64_t bytes = ctas * tile_blocks * (512 * bits);
      const int64_t ns = bytes * 1000 / kBytesPerMicrosecond;
      return ns > t.step ? ns : t.step;
    };
    for (int split = 1; split <= 8 && split <= steps; ++split) {
      if (split > 1 && !can_cut) break;
      const int64_t rounds = split > 1 ? tiles / sms : div_up(tiles, sms);
      int64_t cost =
          rounds > 0 ? rounds * (steps * step(tiles < sms ? tiles : sms) + t.round) + kWideLaunch
                     : 0;
      if (split > 1) {
        const int64_t all = rest * split, most = clustered_sms(split, sms);
        cost += div_up(all, most) * (div_up(steps, split) * step(all < most ? all : most) + t.cut +
                                     split * t.rank) +
                kWideLaunch;
      }
      if (cost < least) {
        least = cost;
        best = {t.tokens, t.blocks, t.groups, tile_blocks, split};
      }
    }
  }
  return best;
}
// half: scales of x's type. half_steps: groups of 32 columns. bf16: of x, else fp16.
constexpr WideChoice choose_wide(int bits, bool half, int64_t m, int64_t n, int64_t k, int64_t sms,
                                 bool half_steps = false, bool bf16 = true) {
  return bits == 8 ? choose_wide(kWideExact8, bits, m, n, k, sms, half_steps, bf16)
         : half    ? choose_wide(kWideHalf, bits, m, n, k, sms, half_steps, bf16)
                   : choose_wide(kWideExact4, bits, m, n, k, sms, half_steps, bf16);
}

static_assert(choose_packed_kernel({90, DType::f32, 4, 1, 64, 64, 64, ZeroKind::none, false}) ==
                  LinearKernel::dequantise,
              "fp32 activations");
static_assert(choose_packed_kernel({90, DType::bf16, 4, 1024, 4096, 4096, 128, ZeroKind::none,
                                    true}) == LinearKernel::skinny,
              "one tile for every M");
static_assert(choose_packed_kernel({90, DType::bf16, 4, 64, 4096, 4096, 128, ZeroKind::none,
                                    false}) == LinearKernel::wide,
              "many tokens");
static_assert(choose_packed_kernel({80, DType::bf16, 4, 1024, 4096, 4096, 128, ZeroKind::none,
                                    false}) == LinearKernel::dequantise,
              "no wgmma before Hopper");

static_assert(choose_packed_kernel({90, DType::f16, 8, 4096, 4096, 4096, 128, ZeroKind::none,
                                    false}) == LinearKernel::dequantise &&
                  choose_packed_kernel({90, DType::f16, 4, 4096, 4096, 4096, 128, ZeroKind::integer,
                                        false, true}) == LinearKernel::wide,
              "prefill");
static_assert(choose_packed_kernel({90, DType::bf16, 4, 64, 4096, 4096, 128, ZeroKind::floating,
                                    false}) == LinearKernel::skinny &&
                  choose_packed_kernel({90, DType::bf16, 4, 512, 4096, 4096, 16, ZeroKind::none,
                                        false}) == LinearKernel::dequantise,
              "what the wgmma kernel does not take");

static_assert(choose_packed_kernel({90, DType::bf16, 4, 8, 4096, 4096, 128, ZeroKind::none,
                                    false}) == LinearKernel::skinny &&
                  choose_packed_kernel({90, DType::bf16, 4, 9, 4096, 4096, 128, ZeroKind::none,
                                        false}) == LinearKernel::wide,
              "few tokens");
static_assert(choose_packed_kernel({90, DType::bf16, 8, 5, 4096, 4096, 128, ZeroKind::none,
                                    false}) == LinearKernel::skinny &&
                  choose_packed_kernel({90, DType::bf16, 8, 6, 4096, 4096, 128, ZeroKind::none,
                                        false}) == LinearKernel::wide &&
                  choose_packed_kernel({90, DType::bf16, 8, 8, 4096, 4096, 32, ZeroKind::none,
                                        false}) == LinearKernel::skinny,
              "few tokens, 8 bit");
static_assert(choose_packed_kernel({90, DType::bf16, 4, 16, 4096, 4096, 128, ZeroKind::none, false,
                                    true, true}) == LinearKernel::skinny &&
                  choose_packed_kernel({90, DType::bf16, 4, 16, 8192, 28672, 128, ZeroKind::none,
                                        false}) == LinearKernel::wide,
              "columns to gather; long columns");

constexpr bool is_wide(WideChoice c, int tokens, int groups, int tile_blocks, int split) {
  return c.tokens == tokens && c.groups == groups && c.tile_blocks == tile_blocks &&
         c.split == split;
}
static_assert(is_wide(choose_wide(4, true, 16, 4096, 4096, 132), 16, 3, 5, 8), "13 tiles");
static_assert(is_wide(choose_wide(4, true, 9, 28672, 4096, 132), 16, 4, 7, 2), "64 tiles");
static_assert(is_wide(choose_wide(4, true, 16, 57344, 8192, 132), 16, 4, 7, 1), "128 tiles");
static_assert(is_wide(choose_wide(4, false, 17, 4096, 4096, 132), 32, 2, 3, 5), "22 tiles");
static_assert(is_wide(choose_wide(8, false, 16, 4096, 4096, 132), 16, 4, 4, 6), "8 bit");
static_assert(is_wide(choose_wide(4, true, 64, 28672, 4096, 132), 64, 2, 4, 1), "112 tiles");
static_assert(is_wide(choose_wide(4, true, 64, 4096, 4096, 132), 64, 3, 3, 5), "22 tiles");
static_assert(is_wide(choose_wide(4, true, 20, 4096, 4096, 132, true), 64, 3, 3, 5),
              "groups of 32 columns");
static_assert(is_wide(choose_wide(4, true, 128, 10240, 8192, 132), 128, 3, 3, 2), "54 tiles");
static_assert(is_wide(choose_wide(4, true, 1024, 6144, 4096, 132), 256, 2, 2, 2), "192 tiles");
static_assert(is_wide(choose_wide(4, true, 8192, 8192, 28672, 132), 256, 2, 2, 1), "many rounds");
static_assert(is_wide(choose_wide(4, false, 128, 28672, 4096, 132), 64, 2, 4, 1), "exact weights");

static_assert(choose_wide(4, true, 64, 4096, 4096, 132, false, false).groups == 2 &&
                  choose_wide(4, true, 128, 10240, 8192, 132, false, false).groups == 2,
              "fp16: tiles of three warpgroups up to 16 tokens only");
static_assert(choose_wide(4, false, 17, 45000, 520, 132).groups == 3 &&
                  choose_wide(4, false, 17, 45000, 520, 132, false, false).groups == 2,
              "the same");
}  // namespace fastinfer
