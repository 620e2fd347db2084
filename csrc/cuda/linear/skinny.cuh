// Y[M, N] = X[M, K] W[N, K]^T + bias for few tokens: the weights pass once, at memory speed.
//
// Tensor cores compute Y^T = W X^T, so that a tile of 8 tokens wastes little. Weights are A in
// registers: packed words are already in the order of its fragments (linear_layout.h); rows of a
// 16-bit W are read in 16-byte pieces, which is the order of fragments of another, equally good
// numbering of the columns. X is B: staged once per CTA in shared memory, row by row.
//
// Rows of W are dealt in tiles of two strips of 16 (16-bit W: one) to teams of CTAs; a team is one
// CTA, or where x does not fit a cluster of 2, 4 or 8 `ranks` that share the columns. The 16 warps
// of a CTA split the columns of a tile: each takes every 16th pair of 64-column blocks. Every warp
// streams its blocks through a private ring of cp.async stages, across tiles, without a barrier;
// codes become exact 16-bit integers, sums over one group are scaled in fp32. At the end of a tile
// the warps are added in order, then the ranks: their sums are exchanged through shared memory of
// the cluster while the next tile already runs (without clusters: through memory, the last CTA adds
// up). The order of every sum is fixed by K and the number of ranks.
//
// Issue slots are what runs out first: 11 instructions turn 8 codes into bf16, so everything else
// is kept out of the loop (running pointers, one scale for two blocks).
//
// Weights are read before grid_wait(): they are older than the launch (launch.cuh).
#pragma once

#include <type_traits>

#include "../common/launch.cuh"
#include "../common/vec.cuh"
#include "../ptx/async_copy.cuh"
#include "../ptx/cluster.cuh"
#include "../ptx/mma.cuh"
#include "skinny_dequant.cuh"
#include "skinny_load.cuh"
#include "skinny_params.h"

namespace fastinfer::cuda {

template <bool kBf16, int kBits, int kTiles, int kStrips, bool kGeneric, int kStages, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 16 / kWarps)
    skinny_kernel(const __grid_constant__ SkinnyParams p) {
  using E = std::conditional_t<kBf16, __nv_bfloat16, __half>;
  using Shape = SkinnyShape<kBits, kStrips>;
  constexpr int kPieces = Shape::kPieces, kRows = Shape::kRows,
                kLogRows = kRows == 16   ? 4
                           : kRows == 32 ? 5
                                         : 6;
  constexpr int kPitch = kRows + 4, kThreads = 32 * kWarps;
  constexpr int kBuffers = kTiles == 1 ? 2 : 1;
  // bf16 from 4 bits: multiply with 128 + q and take (128 + z) sum(x) off each group in fp32.
  constexpr bool kOffset = kBits == 4 && kBf16 && !kGeneric;
  constexpr int kBlockBytes = 512 * kBits;  // of 64 x 64 packed weights
  static_assert(kBits != 16 || !kGeneric, "groups are for packed weights");
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g8 = lane / 4, t = lane % 4;
  const int team = blockIdx.x >> p.rank_shift, rank = blockIdx.x & (p.ranks - 1);
  const int row_part = warp & ((1 << p.row_shift) - 1), column_part = warp >> p.row_shift;
  const int column_parts = kWarps >> p.row_shift, tile_rows = kRows << p.row_shift;
  const int first = rank * p.slice, length = max(0, min(p.slice, p.steps - first));
  const SkinnyShared at = skinny_shared(p.m, p.x_pitch, p.slice, kWarps, kStages, p.slot_bytes,
                                        kRows, kTiles, p.ranks > 1 ? tile_rows : 0);
  const uint32_t base = shared_address(shared);
  const uint32_t ring = base + at.ring + warp * p.slot_bytes, slot_step = kWarps * p.slot_bytes;
  const uint32_t ring_end = ring + kStages * slot_step;

  grid_launch_dependents();

  // ---- the stream of weights: pairs of blocks of this warp, tile after tile
  // This warp's part of a tile; parts are missing in the last round only.
  const auto part_of_tile = [&](int round) {
    SkinnyTile tile = skinny_tile(p.deal, p.teams, team, round);
    tile.strip += row_part * kStrips;
    tile.count = max(0, min(tile.count - row_part * kStrips, kStrips));
    return tile;
  };
  SkinnyTile load_tile = part_of_tile(0);
  int load_round = 0, load_rel = 2 * column_part, lane16 = lane * 16;
  constexpr int kRowPointers = kBits == 16 ? 2 * kStrips : 1;
  const char* from[kRowPointers];
  uint32_t load_to = ring;
  // Lane i < 8 copies scales of row g8 = i, lanes from 8 on zeros: 16 bytes each.
  [[maybe_unused]] const char *meta_values = nullptr, *meta_from = nullptr;
  [[maybe_unused]] int meta_row = 0, meta_half = 0, meta_group = 0;
  [[maybe_unused]] bool meta_mine = false;
  if constexpr (kBits != 16) {
    const DType type = lane < 8 ? p.scale_dtype : p.zero_dtype;
    meta_values = static_cast<const char*>(lane < 8 ? p.scales : p.zeros);
    meta_row = type == DType::u8 ? 64 : type == DType::f32 ? 256 : 128;
    meta_half = type == DType::f32 ? 16 : 0;
    meta_mine = meta_values && (lane < 8 || (lane < 16 && (type != DType::u8 || lane < 12)));
    meta_values += lane % 8 * (type == DType::f32 ? 32 : 16);
    meta_group = p.tiles * meta_row;
    keep(meta_row), keep(meta_half), keep(meta_group), keep(meta_values);
  }
  keep(lane16);
  const auto start_tile = [&] {
    if constexpr (kBits == 16) {
#pragma unroll
      for (int i = 0; i < kRowPointers; ++i) {
        const int64_t row = min(load_tile.strip * 16 + g8 + 8 * i, p.n - 1);
        from[i] = static_cast<const char*>(p.w) +
                  (row * p.w_stride + (first + load_rel) * 64 + 8 * t) * 2;
      }
    } else {
      const uint32_t strip = load_tile.strip;
      from[0] = static_cast<const char*>(p.w) +
                (static_cast<int64_t>(strip / 4) * p.steps + first + load_rel) * kBlockBytes +
                strip % 4 * (kBlockBytes / 4) + lane16;
      meta_from = meta_values + static_cast<int64_t>(strip / 4) * meta_row +
                  static_cast<int>(strip % 4 / 2) * meta_half;
    }
  };
  if (load_rel >= length) load_tile.count = 0;  // no columns for this warp
  if (load_tile.count > 0) start_tile();
  // Issues block `odd` of the pair; the odd one moves on. Of packed weights absent strips and
  // blocks are left as they are: any codes are finite, and meet zeros in x or rows nobody stores.
  const auto load = [&](auto odd_constant) {
    constexpr int kOdd = decltype(odd_constant)::value;
    if (load_tile.count > 0) {
      const uint32_t to = load_to + lane16;
      if constexpr (kBits == 16) {
        const int left = p.k - (first + load_rel + kOdd) * 64 - 8 * t;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {  // (8 rows, columns of 32)
          if (i >= 4 && load_tile.count < kStrips) break;
          const bool valid = left > 32 * (i % 2);
          cp_async_zero(to + i * 512, valid ? from[i / 2] + kOdd * 128 + i % 2 * 64 : from[0],
                        valid ? 16 : 0);
        }
      } else if (kOdd == 0 || load_rel + 1 < length) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          constexpr int kStripPieces = kPieces / kStrips;
          if (i % kStripPieces == 0 && i > 0 && load_tile.count <= i / kStripPieces) break;
          cp_async_zero(to + i * 512, from[0] + (kOdd * kBlockBytes + i * 512), 16);
        }
        if (meta_mine && (kGeneric || kOdd == 0 || !p.pair)) {
          const int unit = (first + load_rel + kOdd) * (kGeneric ? 8 : 1);
          const int g = group_of(unit, p.group_magic);
          const char* values = meta_from + static_cast<int64_t>(g) * meta_group;
          cp_async_zero(to + kPieces * 512, values, 16);
          if constexpr (kGeneric) {
            const int last = min(group_of(unit + 7, p.group_magic), p.groups - 1);
            for (int i = 1; i <= last - g; ++i)
              cp_async_zero(to + kPieces * 512 + i * 256,
                            values + static_cast<int64_t>(i) * meta_group, 16);
          }
        }
      }
      if constexpr (kOdd == 1) {
        load_rel += 2 * column_parts;
#pragma unroll
        for (auto& f : from) f += 2 * column_parts * (kBits == 16 ? 128 : kBlockBytes);
        if (load_rel >= length) {
          load_rel = 2 * column_part;
          load_tile = part_of_tile(++load_round);
          if (load_tile.count > 0) start_tile();
        }
      }
    }
    cp_async_commit();
    load_to = load_to + slot_step == ring_end ? ring : load_to + slot_step;
  };
  constexpr std::integral_constant<int, 0> kEven{};
  constexpr std::integral_constant<int, 1> kOdd{};
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i % 2 == 0) {
      load(kEven);
    } else {
      load(kOdd);
    }
  }
  // ---- x
  if (threadIdx.x < kSkinnyZeroBytes / 16)
    reinterpret_cast<uint4*>(shared)[threadIdx.x] = make_uint4(0, 0, 0, 0);
  grid_wait();
  stage_x<kThreads>(p, reinterpret_cast<E*>(shared + at.x), first * 64, (length + 1) / 2 * 128);
  __syncthreads();

  // Sums of x over blocks of 64 columns, [m][slice + 4]: 8 lanes each.
  [[maybe_unused]] const int sum_pitch = p.slice + 4;
  [[maybe_unused]] float* block_sums = reinterpret_cast<float*>(shared + at.block_sums);
  if constexpr (kOffset) {
    const int blocks = (length + 1) / 2 * 2, all = p.m * blocks;
    for (int i = threadIdx.x / 8; i < (all + 3) / 4 * 4; i += kThreads / 8) {
      const int token = i / blocks, block = i - token * blocks;
      float v[8] = {};
      if (i < all)
        unpack<E>(v, load_shared(base + at.x + (token * p.x_pitch + block * 64) * 2 +
                                 threadIdx.x % 8 * 16));
      float total = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
#pragma unroll
      for (int lanes = 4; lanes > 0; lanes /= 2)
        total += __shfl_xor_sync(0xFFFFFFFFu, total, lanes);
      if (i < all && threadIdx.x % 8 == 0) block_sums[token * sum_pitch + block] = total;
    }
    __syncthreads();
  }
  // Where this lane reads fragments of x: a row of ldmatrix, or its own 16 bytes. Absent tokens
  // read zeros.
  uint32_t x_base[kTiles], x_mask[kTiles];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int token = 8 * i + (kBits == 16 ? g8 : lane % 8);
    const bool there = token < p.m;
    x_base[i] = there ? base + at.x + token * p.x_pitch * 2 + (kBits == 16 ? t : lane / 8) * 16
                      : base + (kBits == 16 ? t * 16 : 0);
    x_mask[i] = there ? ~0u : 0u;
  }

  [[maybe_unused]] const bool wide_scale = p.scale_dtype == DType::f32;
  [[maybe_unused]] const bool sums = kGeneric && p.zeros != nullptr;
  [[maybe_unused]] const bool float_zeros = p.zero_dtype != DType::u8;
  [[maybe_unused]] Int4Zero<kBf16> zero[kStrips];
  if constexpr (kBits == 4) {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) zero[s].set(0, 8), zero[s].set(1, 8);
  }
  [[maybe_unused]] float offset[kStrips][2];  // 128 + z
#pragma unroll
  for (int s = 0; s < kStrips; ++s) offset[s][0] = offset[s][1] = 136.0f;
  uint32_t slot = ring;
  int meta_at = g8 * 16;
  keep(meta_at);
  int buffer = 0, waiting = -1, waiting_rows = 0;  // tile whose ranks' sums are under way

  const auto store = [&](int token, int row, float v) {
    if (row >= p.n) return;
    if (p.bias) v = __fadd_rn(v, to_float(static_cast<const E*>(p.bias)[row]));
    static_cast<E*>(p.out)[token * p.out_stride + row] = from_float<E>(v);
  };
  // Adds the ranks' sums of tile `waiting` and writes this rank's share of it.
  const auto finish = [&](int which) {
    const float* mine = reinterpret_cast<const float*>(shared + at.sums) + which * p.m * tile_rows;
    const int log_rows = kLogRows + p.row_shift;
    for (int e = rank * kThreads + threadIdx.x; e < p.m << log_rows; e += p.ranks * kThreads) {
      const int row = e & (tile_rows - 1);
      if (row >= waiting_rows) continue;
      float v = cluster_load(mine + e, 0);
      for (int r = 1; r < p.ranks; ++r) v += cluster_load(mine + e, r);
      store(e >> log_rows, waiting * 16 + row, v);
    }
  };

  for (int round = 0;; ++round) {
    const SkinnyTile tile = skinny_tile(p.deal, p.teams, team, round);
    if (tile.count == 0) break;
    const int columns_end = tile.count > row_part * kStrips ? length : 0;
    float total[kStrips][kTiles][4] = {};
    [[maybe_unused]] const int strip0 = (tile.strip + row_part * kStrips) % 4;
    for (int rel = 2 * column_part; rel < columns_end; rel += 2 * column_parts) {
      float acc[kStrips][kTiles][4] = {}, sum[kTiles][4] = {};
      uint2 scale[kStrips];
      uint32_t x_at[kTiles];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) x_at[i] = x_base[i] + ((rel * 128) & x_mask[i]);

#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        cp_async_wait<kStages - 2>();
        __syncwarp();
        if ((kStages - 1 + odd) % 2 == 0) {
          load(kEven);
        } else {
          load(kOdd);
        }
        uint32_t w[kPieces][4];
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          // 8 bit: 32 bytes per lane; neighbours in fours take their halves in opposite order, for
          // the banks.
          const int swap = lane / 4 % 2;
          const uint32_t piece = kBits == 8
                                     ? slot + i / 2 * 1024 + lane16 * 2 + ((i % 2) ^ swap) * 16
                                     : slot + i * 512 + lane16;
          const uint4 v = load_shared(piece);
          w[i][0] = v.x, w[i][1] = v.y, w[i][2] = v.z, w[i][3] = v.w;
        }
        if constexpr (kBits == 8) {
          const bool swap = lane / 4 % 2;
#pragma unroll
          for (int i = 0; i < kPieces; i += 2)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const uint32_t low = swap ? w[i + 1][j] : w[i][j];
              w[i + 1][j] = swap ? w[i][j] : w[i + 1][j];
              w[i][j] = low;
            }
        }
        [[maybe_unused]] const uint32_t meta = slot + kPieces * 512;
        slot = slot + slot_step == ring_end ? ring : slot + slot_step;
        // Of a strip: 16-bit values lie in fours of strips, fp32 ones in twos, u8 ones in fours.
        const auto at_strip = [&](uint32_t from_meta, int s, bool wide) {
          return from_meta + meta_at + (wide ? ((strip0 + s) & 1) * 8 : (strip0 + s) * 4);
        };
        if constexpr (!kGeneric && kBits != 16) {
          if (odd == 0 || (!p.pair && rel + 1 < length)) {
#pragma unroll
            for (int s = 0; s < kStrips; ++s)
              scale[s] = load_two(at_strip(meta, s, wide_scale), wide_scale);
            if (kBits == 4 && p.zeros) {
#pragma unroll
              for (int s = 0; s < kStrips; ++s) {
                const uint32_t z = load_shared_2(meta + 128 + g8 * 8 + (strip0 + s) * 2);
                if constexpr (kOffset) {
                  offset[s][0] = static_cast<float>(128 + (z & 0xFF));
                  offset[s][1] = static_cast<float>(128 + (z >> 8));
                } else {
                  zero[s].set(0, z & 0xFF);
                  zero[s].set(1, z >> 8);
                }
              }
            }
          }
        }
        // Generic: group of the current 8 columns, counted from the block's first.
        [[maybe_unused]] int group = 0, boundary = 0, last_group = 0;
        if constexpr (kGeneric) {
          const int unit = (first + rel + odd) * 8, g = group_of(unit, p.group_magic);
          boundary = (g + 1) * p.group_units - unit;
          last_group = max(0, p.groups - 1 - g);  // padding beyond K has none of its own
          if (rel + odd >= length) break;         // nor has a block beyond the share
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {  // 32 columns
          uint32_t b[kTiles][4];
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
            const uint32_t row = x_at[i] + odd * 128 + h * 64;
            if constexpr (kBits == 16) {
              const uint4 v = load_shared(row);
              b[i][0] = v.x, b[i][1] = v.y, b[i][2] = v.z, b[i][3] = v.w;
            } else {
              ldmatrix_x4(b[i], row);
            }
          }
#pragma unroll
          for (int j = 0; j < 2; ++j) {  // 16 columns
            uint32_t a[kStrips][4];
#pragma unroll
            for (int s = 0; s < kStrips; ++s) {
              if constexpr (kBits == 4) {
                if constexpr (kOffset) {
                  offset_int4(a[s], w[s][2 * h + j]);
                } else {
                  dequantize_int4<kBf16>(a[s], w[s][2 * h + j], zero[s]);
                }
              } else if constexpr (kBits == 8) {
                dequantize_int8<kBf16>(a[s], w[2 * s + h][2 * j], w[2 * s + h][2 * j + 1]);
              } else {
                a[s][0] = w[4 * s + h][2 * j], a[s][1] = w[4 * s + 2 + h][2 * j];
                a[s][2] = w[4 * s + h][2 * j + 1], a[s][3] = w[4 * s + 2 + h][2 * j + 1];
              }
            }
            if constexpr (!kGeneric) {
#pragma unroll
              for (int s = 0; s < kStrips; ++s)
#pragma unroll
                for (int i = 0; i < kTiles; ++i)
                  mma_16816<kBf16>(kBits == 16 ? total[s][i] : acc[s][i], a[s], b[i][2 * j],
                                   b[i][2 * j + 1]);
            } else {
              constexpr uint32_t kOnes = kBf16 ? 0x3F803F80u : 0x3C003C00u;
#pragma unroll
              for (int half = 0; half < 2; ++half) {  // 8 columns
                const int done = 4 * h + 2 * j + half + 1;
#pragma unroll
                for (int i = 0; i < kTiles; ++i) {
#pragma unroll
                  for (int s = 0; s < kStrips; ++s)
                    mma_1688<kBf16>(acc[s][i], a[s][2 * half], a[s][2 * half + 1],
                                    b[i][2 * j + half]);
                  if (sums) mma_1688<kBf16>(sum[i], kOnes, kOnes, b[i][2 * j + half]);
                }
                if (done == boundary || done == 8) {
#pragma unroll
                  for (int s = 0; s < kStrips; ++s) {
                    const uint32_t values = meta + group * 256;
                    const float2 f = two_floats(
                        load_two(at_strip(values, s, wide_scale), wide_scale), p.scale_dtype);
                    const float factor[2] = {f.x, f.y};
                    float z[2] = {};
                    if (sums && float_zeros) {
                      const bool wide = p.zero_dtype == DType::f32;
                      const float2 v =
                          two_floats(load_two(at_strip(values + 128, s, wide), wide), p.zero_dtype);
                      z[0] = v.x, z[1] = v.y;
                    } else if (sums) {
                      const int v = load_shared_2(values + 128 + g8 * 8 + (strip0 + s) * 2);
                      z[0] = static_cast<float>((v & 0xFF) - (1 << (kBits - 1)));
                      z[1] = static_cast<float>((v >> 8) - (1 << (kBits - 1)));
                    }
#pragma unroll
                    for (int i = 0; i < kTiles; ++i)
#pragma unroll
                      for (int e = 0; e < 4; ++e) {
                        float v = acc[s][i][e], &to = total[s][i][e];
                        if (sums && !float_zeros) v = fmaf(-z[e / 2], sum[i][e % 2], v);
                        to = fmaf(v, factor[e / 2], to);
                        if (sums && float_zeros) to = fmaf(z[e / 2], sum[i][e % 2], to);
                        acc[s][i][e] = 0.0f;
                      }
                  }
#pragma unroll
                  for (int i = 0; i < kTiles; ++i)
#pragma unroll
                    for (float& v : sum[i]) v = 0.0f;
                  if (done == boundary) {
                    group = min(group + 1, last_group);
                    boundary += p.group_units;
                  }
                }
              }
            }
          }
        }
        if constexpr (!kGeneric && kBits != 16) {
          // A block beyond the share adds zeros; where it has no scale of its own, the first one
          // has been applied.
          if (odd == 0 ? !p.pair : (p.pair || rel + 1 < length)) {
            [[maybe_unused]] float x_sum[kTiles][2];
            if constexpr (kOffset) {
#pragma unroll
              for (int i = 0; i < kTiles; ++i)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                  const float2 v = *reinterpret_cast<const float2*>(
                      block_sums + min(8 * i + 2 * t + e, p.m - 1) * sum_pitch + rel);
                  x_sum[i][e] = p.pair ? v.x + v.y : odd == 0 ? v.x : v.y;
                }
            }
#pragma unroll
            for (int s = 0; s < kStrips; ++s) {
              const float2 f = two_floats(scale[s], p.scale_dtype);
#pragma unroll
              for (int i = 0; i < kTiles; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                  float v = acc[s][i][e];
                  if constexpr (kOffset) v = fmaf(-offset[s][e / 2], x_sum[i][e % 2], v);
                  total[s][i][e] = fmaf(v, e < 2 ? f.x : f.y, total[s][i][e]);
                  acc[s][i][e] = 0.0f;
                }
            }
          }
        }
      }
    }

    // ---- the end of a tile: column parts are added in order, 8 tokens at a time
    const int rows = tile.count * 16;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int tokens = min(p.m - 8 * i, 8), pitch = min(p.m, 8) * kPitch;  // of a warp
      if (i > 0 && tokens <= 0) break;
      if constexpr (kBuffers == 1) __syncthreads();  // the last ones are read
      float* partial = reinterpret_cast<float*>(shared + at.partial) +
                       (kBuffers == 2 ? buffer : 0) * kWarps * pitch;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (2 * t + e < tokens) {
          float* to = partial + warp * pitch + (2 * t + e) * kPitch + g8;
#pragma unroll
          for (int s = 0; s < kStrips; ++s) {
            to[16 * s] = total[s][i][e];
            to[16 * s + 8] = total[s][i][e + 2];
          }
        }
      }
      __syncthreads();
      if (i == 0 && p.clustered && waiting >= 0) {
        cluster_wait_shared();
        finish(buffer ^ 1);
      }
      const int log_rows = kLogRows + p.row_shift;
      for (int e = threadIdx.x; e < tokens << log_rows; e += kThreads) {
        const int token = e >> log_rows, row = e & (tile_rows - 1);
        const float* values = partial + row / kRows * pitch + token * kPitch + row % kRows;
        float v = values[0];
#pragma unroll 8
        for (int c = 1; c < column_parts; ++c) v += values[(c << p.row_shift) * pitch];
        if (p.ranks == 1) {
          if (row < rows) store(8 * i + token, tile.strip * 16 + row, v);
        } else if (p.clustered) {
          reinterpret_cast<float*>(shared +
                                   at.sums)[((buffer * p.m + 8 * i + token) << log_rows) + row] = v;
        } else {
          const int64_t first_token =
              (static_cast<int64_t>(tile.strip) * p.ranks + rank) * p.m + 8 * i;
          p.partial[(first_token + token) * kRows + row] = v;
        }
      }
    }
    if (p.clustered) {
      cluster_arrive_shared();
      waiting = tile.strip, waiting_rows = rows;
    } else if (p.ranks > 1) {  // the last rank to come adds all up, in order
      __threadfence();
      __syncthreads();
      int* last = reinterpret_cast<int*>(shared + at.sums);
      if (threadIdx.x == 0) {
        uint32_t* ticket = p.tickets + tile.strip;
        *last = atomicAdd(ticket, 1u) + 1 == static_cast<uint32_t>(p.ranks);
        if (*last) *ticket = 0;
      }
      __syncthreads();
      if (*last) {
        __threadfence();
        const float* all = p.partial + static_cast<int64_t>(tile.strip) * p.ranks * p.m * kRows;
        for (int e = threadIdx.x; e < p.m * kRows; e += kThreads) {
          float v = __ldcg(all + e);
          for (int r = 1; r < p.ranks; ++r) v += __ldcg(all + r * p.m * kRows + e);
          if (e % kRows < rows) store(e / kRows, tile.strip * 16 + e % kRows, v);
        }
      }
      __syncthreads();
    }
    buffer ^= 1;
  }
  if (p.clustered) {
    if (waiting >= 0) {
      cluster_wait_shared();
      finish(buffer ^ 1);
    }
    cluster_sync_shared();  // others may still read this CTA's sums
  }
}

}  // namespace fastinfer::cuda
