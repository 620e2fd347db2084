// Launches the wgmma kernel for packed weights: descriptors, order of the work, rounds and
// clusters.
#pragma once

#include "wide_sm90.cuh"

namespace fastinfer::cuda::wide {

template <class T, class Tile>
int launch_wide(const PackedLinear& p, int tile_blocks, int split, void* stream) {
  const int64_t steps = ceil_div(p.k, 64), blocks = ceil_div(p.n, 64), sms = device_facts().sms;
  if (tile_blocks != Tile::kAllBlocks && !(Tile::kPartial && tile_blocks == Tile::kAllBlocks - 1))
    return cudaErrorInvalidConfiguration;
  const int64_t row_tiles = ceil_div(blocks, tile_blocks);
  const int64_t token_tiles = ceil_div(p.m, Tile::kTokens), tiles = row_tiles * token_tiles;
  if (split > steps) split = static_cast<int>(steps);
  while (split > 1 &&
         Tile::sum_units(tile_blocks * Tile::kUnits, split) * kSumUnitBytes > Tile::kSumRoom)
    --split;
  if (tiles > INT32_MAX / 8 || p.k > INT32_MAX - 64 || p.n > INT32_MAX - 64)
    return cudaErrorInvalidConfiguration;
  CUtensorMap x_map, w_map;
  int error = activation_map(x_map, p.x, p.dtype, p.m, p.k, p.x_stride, Tile::kTokens);
  if (!error)
    error = packed_map(w_map, p.qweight, steps * (Tile::kBits / 4), blocks, Tile::kBits / 4,
                       tile_blocks);
  if (error) return error;
  // Token tiles walked before the next row tile: their X stays in the second-level cache.
  int64_t section = device_facts().l2_bytes / 3 / (2 * p.k * Tile::kTokens);
  section = section < 1 ? 1 : section < token_tiles ? section : token_tiles;
  WideParams params{
      p.qweight,
      p.scales,
      static_cast<const uint8_t*>(p.zeros),
      p.scale_dtype,
      p.out,
      p.out_stride,
      p.bias,
      static_cast<int32_t>(p.m),
      static_cast<int32_t>(p.n),
      static_cast<int32_t>(steps),
      static_cast<int32_t>(blocks),
      tile_blocks,
      static_cast<int32_t>(p.groups == 1 ? steps : ceil_div(p.group_columns, 64)),
      static_cast<int32_t>(row_tiles),
      static_cast<int32_t>(token_tiles),
      static_cast<int32_t>(section),
      0,
      0,
      false,
      p.groups > 1 && p.group_columns == 32,
      reinterpret_cast<uintptr_t>(p.out) % 16 == 0 && (p.m == 1 || p.out_stride % 8 == 0),
  };
  // Tiles [first, end): in rounds, or one per cluster of `ranks` CTAs.
  const auto start = [&](int64_t first, int64_t end, int ranks) -> int {
    const int64_t count = end - first, ctas = ranks > 1 ? count * ranks : count < sms ? count : sms;
    params.first_tile = static_cast<int32_t>(first);
    params.end_tile = static_cast<int32_t>(end);
    params.split = ranks > 1;
    return launch_clusters(wide_kernel<T, Tile>, ranks, static_cast<unsigned>(ctas), Tile::kThreads,
                           Tile::kSharedBytes, stream, params, x_map, w_map,
                           static_cast<int32_t>(p.k));
  };
  const int64_t whole = split > 1 ? tiles / sms * sms : tiles;
  if (whole > 0) error = start(0, whole, 1);
  if (!error && whole < tiles) error = start(whole, tiles, split);
  return error;
}

// The instance for a shape; linear_choice.h knows which exist. 4 bit: tiles of three warpgroups for
// more than 16 tokens are for bf16 only. 8-bit codes have no kHalf instances: their way to bf16 is
// not through one subtraction.
template <class T, int kBits>
int launch_shape(const PackedLinear& p, WideShape s, void* stream) {
  const auto is = [&](int tokens, int blocks, int groups) {
    return s.tokens == tokens && s.blocks == blocks && s.groups == groups;
  };
  const auto launch = [&](auto tile) {
    return launch_wide<T, decltype(tile)>(p, s.tile_blocks, s.split, stream);
  };
  if constexpr (kBits == 8 || !std::is_same_v<T, __half>)
    if (is(32, 2, 3)) return launch(WideTile<kBits, 32, 2, 3, false>());
  if constexpr (kBits == 4) {
    if (is(16, 2, 3)) return launch(WideTile<4, 16, 2, 3, false>());
    if (is(16, 2, 4)) return launch(WideTile<4, 16, 2, 4, false>());
    const bool half = p.scale_dtype == p.dtype;
    if constexpr (!std::is_same_v<T, __half>) {
      if (is(64, 1, 3)) return launch(WideTile<4, 64, 1, 3, false>());
      if (is(128, 1, 3) && half) return launch(WideTile<4, 128, 1, 3, true>());
    }
    if (is(128, 1, 2) && half) return launch(WideTile<4, 128, 1, 2, true>());
    if (is(256, 1, 2) && half) return launch(WideTile<4, 256, 1, 2, true>());
  } else {
    if (is(16, 1, 4)) return launch(WideTile<8, 16, 1, 4, false>());
    if (is(16, 2, 4)) return launch(WideTile<8, 16, 2, 4, false>());
    if (is(128, 1, 2)) return launch(WideTile<8, 128, 1, 2, false>());
  }
  if (is(32, 2, 2)) return launch(WideTile<kBits, 32, 2, 2, false>());
  if (is(64, 2, 2)) return launch(WideTile<kBits, 64, 2, 2, false>());
  if (is(256, 1, 2)) return launch(WideTile<kBits, 256, 1, 2, false>());
  return cudaErrorInvalidConfiguration;
}

}  // namespace fastinfer::cuda::wide
