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
  // The skinny kernel takes 16 tokens at a time: two passes read large weights twice. At 256 tokens
  // scales of another type cost more.
  const int64_t few = !wide ? 256 : c.half || c.n >= 16384 ? 16 : 24;
  if (c.m <= few) return LinearKernel::skinny;
  return wide && (c.half || c.m <= 3072) ? LinearKernel::wide : LinearKernel::dequantise;
}

// Tile of the wgmma kernel: tokens x (128 * blocks) rows. Tiles beyond whole rounds over the
// multiprocessors are given to clusters of `split` CTAs that cut K.
struct WideChoice {
  int tokens, blocks, split;
};

// What a tile costs, in nanoseconds, fitted to an H100 within 3 to 6 % (docs/kernels/linear.md): a
// step of 64 columns; start and end of a tile; the same of a tile whose K is cut, and per CTA of
// it.
struct WideCost {
  int tokens, blocks, step, round, cut, rank;
};
constexpr int kWideLaunch = 1800;
// Scales of x's type (4 bit only), and others.
constexpr WideCost kWideHalf[] = {
    {64, 1, 383, 2413, 727, 1714}, {64, 2, 550, 3446, 3813, 1794}, {128, 1, 461, 2954, 1260, 1501},
    {128, 2, 748, 5121, 0, 3180},  {256, 1, 673, 4853, 7047, 470},
};
constexpr WideCost kWideExact[] = {
    {64, 2, 663, 3116, 3618, 1862},
    {128, 1, 521, 3278, 2150, 1488},
    {256, 1, 724, 4413, 6180, 681},
};

// CTAs of clusters that run at the same time: what does not fill a GPC stays idle.
constexpr int64_t clustered_sms(int split, int64_t sms) {
  return split <= 2 ? sms : sms * (split % 4 == 0 ? 10 : 9) / 11;
}

// The candidate whose last CTA is done first.
template <int kCount>
constexpr WideChoice choose_wide(const WideCost (&costs)[kCount], int64_t m, int64_t n, int64_t k,
                                 int64_t sms) {
  WideChoice best{};
  int64_t least = INT64_MAX;
  const int64_t steps = div_up(k, 64);
  for (const WideCost& t : costs) {
    const int64_t tiles = div_up(n, 128 * t.blocks) * div_up(m, t.tokens), rest = tiles % sms;
    // After many rounds the last one hardly counts.
    const bool can_cut = rest > 0 && tiles < 4 * sms;
    for (int split = 1; split <= 8 && split <= steps; ++split) {
      if (split > 1 && !can_cut) break;
      const int64_t rounds = split > 1 ? tiles / sms : div_up(tiles, sms);
      int64_t cost = rounds * (steps * t.step + t.round) + (rounds > 0 ? kWideLaunch : 0);
      if (split > 1)
        cost += div_up(rest * split, clustered_sms(split, sms)) *
                    (div_up(steps, split) * t.step + t.cut + split * t.rank) +
                kWideLaunch;
      if (cost < least) {
        least = cost;
        best = {t.tokens, t.blocks, split};
      }
    }
  }
  return best;
}
constexpr WideChoice choose_wide(bool half, int64_t m, int64_t n, int64_t k, int64_t sms) {
  return half ? choose_wide(kWideHalf, m, n, k, sms) : choose_wide(kWideExact, m, n, k, sms);
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

constexpr bool is_wide(WideChoice c, int tokens, int blocks, int split) {
  return c.tokens == tokens && c.blocks == blocks && c.split == split;
}
static_assert(is_wide(choose_wide(true, 64, 28672, 4096, 132), 64, 2, 1), "112 tiles, one round");
static_assert(is_wide(choose_wide(true, 64, 4096, 4096, 132), 64, 1, 3), "32 tiles: K in three");
static_assert(is_wide(choose_wide(true, 128, 28672, 4096, 132), 128, 2, 1), "rows before tokens");
static_assert(is_wide(choose_wide(true, 1024, 6144, 4096, 132), 256, 1, 2), "132 tiles and 60");
static_assert(is_wide(choose_wide(true, 8192, 8192, 28672, 132), 256, 1, 1), "many rounds");
static_assert(is_wide(choose_wide(false, 128, 28672, 4096, 132), 128, 1, 1), "exact weights");
static_assert(is_wide(choose_wide(true, 40, 1, 1, 132), 64, 1, 1), "next to nothing");

}  // namespace fastinfer
