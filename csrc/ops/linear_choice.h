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
  if (c.m <= (wide ? 32 : 256)) return LinearKernel::skinny;
  return wide && c.m <= 4096 ? LinearKernel::wide : LinearKernel::dequantise;
}

// Tile of the wgmma kernel: tokens x (128 * blocks) rows; `split` CTAs share a tile's K.
struct WideChoice {
  int tokens, blocks, split;
};

// The candidate whose last CTA is done first. A step of 64 columns costs the larger of its products
// and of its loads, a tile a start and an end.
constexpr WideChoice choose_wide(int bits, int64_t m, int64_t n, int64_t k, int sms) {
  constexpr WideChoice kTiles[] = {{64, 2, 1}, {128, 1, 1}, {256, 1, 1}};
  WideChoice best{};
  int64_t least = INT64_MAX;
  const int64_t steps = div_up(k, 64);
  for (const WideChoice& t : kTiles) {
    const int64_t tiles = div_up(n, 128 * t.blocks) * div_up(m, t.tokens);
    const int64_t products = t.blocks * t.tokens * 5;                      // clocks
    const int64_t loads = (t.tokens * 128 + t.blocks * 1024 * bits) / 20;  // clocks
    const int64_t step = products > loads ? products : loads;
    for (int split = 1; split <= 8 && split <= steps; ++split) {
      if (split > 1 && tiles * split > sms) break;
      const int64_t rounds = split > 1 ? 1 : div_up(tiles, sms);
      const int64_t cost = rounds * (div_up(steps, split) * step + 1500 + 8 * t.blocks * t.tokens) +
                           (split > 1 ? 2000 + 4 * t.blocks * t.tokens : 0);
      if (cost < least) {
        least = cost;
        best = {t.tokens, t.blocks, split};
      }
    }
  }
  return best;
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

}  // namespace fastinfer
