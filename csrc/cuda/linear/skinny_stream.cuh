// What a warp of the skinny kernel reads: its share of the weights, tile after tile, through a
// private ring of cp.async slots. A slot is one block of 64 columns of the warp's strips, then 8
// rows of 16 bytes of scales and 8 of zeros (generic: for every group the block touches).
#pragma once

#include "skinny_load.cuh"

namespace fastinfer::cuda {

// The warp's part of every tile: every column_parts'th pair of column blocks of its rank's
// `length` from `first` on, and strips from row_part * kStrips on.
template <int kStrips, int kWarps>
struct SkinnyShare {
  int team, rank, row_part, column_part, column_parts, first, length;

  __device__ __forceinline__ SkinnyShare(const SkinnyParams& p, int warp)
      : team(blockIdx.x >> p.rank_shift),
        rank(blockIdx.x & (p.ranks - 1)),
        row_part(warp & ((1 << p.row_shift) - 1)),
        column_part(warp >> p.row_shift),
        column_parts(kWarps >> p.row_shift),
        first(rank * p.slice),
        length(max(0, min(p.slice, p.steps - first))) {}
  // Parts are missing in the last round only.
  __device__ __forceinline__ SkinnyTile part_of_tile(const SkinnyParams& p, int round) const {
    SkinnyTile tile = skinny_tile(p.deal, p.teams, team, round);
    tile.strip += row_part * kStrips;
    tile.count = max(0, min(tile.count - row_part * kStrips, kStrips));
    return tile;
  }
};

template <int kBits, int kStrips, bool kGeneric, int kWarps>
struct SkinnyStream {
  static constexpr int kPieces = kSkinnyPieces<kBits, kStrips>;
  static constexpr int kBlockBytes = 512 * kBits;  // of 64 x 64 packed weights
  static constexpr int kRowPointers = kBits == 16 ? 2 * kStrips : 1;

  const SkinnyParams& p;
  const SkinnyShare<kStrips, kWarps>& share;
  int lane;
  SkinnyTile tile;
  int round, rel;  // next block: the rel-th of the share
  const char* from[kRowPointers];
  // Lane i < 8 copies scales of row g8 = i, lanes from 8 on zeros: 16 bytes each.
  const char *meta_values, *meta_from;
  int meta_row, meta_half, meta_group;
  bool meta_mine;

  __device__ __forceinline__ SkinnyStream(const SkinnyParams& params,
                                          const SkinnyShare<kStrips, kWarps>& of, int lane_)
      : p(params), share(of), lane(lane_), tile(of.part_of_tile(params, 0)), round(0) {
    rel = 2 * share.column_part;
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
    if (rel >= share.length) tile.count = 0;  // no columns for this warp
    if (tile.count > 0) start_tile();
  }

  __device__ __forceinline__ void start_tile() {
    if constexpr (kBits == 16) {
      const int g8 = lane / 4, t = lane % 4;
#pragma unroll
      for (int i = 0; i < kRowPointers; ++i) {
        const int64_t row = min(tile.strip * 16 + g8 + 8 * i, p.n - 1);
        from[i] = static_cast<const char*>(p.w) +
                  (row * p.w_stride + (share.first + rel) * 64 + 8 * t) * 2;
      }
    } else {
      const uint32_t strip = tile.strip;
      from[0] = static_cast<const char*>(p.w) +
                (static_cast<int64_t>(strip / 4) * p.steps + share.first + rel) * kBlockBytes +
                strip % 4 * (kBlockBytes / 4) + lane * 16;
      meta_from = meta_values + static_cast<int64_t>(strip / 4) * meta_row +
                  static_cast<int>(strip % 4 / 2) * meta_half;
    }
  }

  // Issues block `odd` of the pair to the slot at `to` (this lane's 16 bytes of it); the odd one
  // moves on. Of packed weights absent strips and blocks are left as they are: any codes are
  // finite, and meet zeros in x or rows nobody stores.
  __device__ __forceinline__ void load(int odd, uint32_t to) {
    if (tile.count > 0) {
      if constexpr (kBits == 16) {
        load_rows(odd, to);
      } else if (odd == 0 || rel + 1 < share.length) {
        load_packed(odd, to);
      }
      if (odd == 1) next_pair();
    }
    cp_async_commit();
  }

 private:
  __device__ __forceinline__ void load_rows(int odd, uint32_t to) {
    const int left = p.k - (share.first + rel + odd) * 64 - 8 * (lane % 4);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {  // (8 rows, columns of 32)
      if (i >= 4 && tile.count < kStrips) break;
      const bool valid = left > 32 * (i % 2);
      cp_async_zero(to + i * 512, valid ? from[i / 2] + odd * 128 + i % 2 * 64 : from[0],
                    valid ? 16 : 0);
    }
  }
  __device__ __forceinline__ void load_packed(int odd, uint32_t to) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      constexpr int kStripPieces = kPieces / kStrips;
      if (i % kStripPieces == 0 && i > 0 && tile.count <= i / kStripPieces) break;
      cp_async_zero(to + i * 512, from[0] + (odd * kBlockBytes + i * 512), 16);
    }
    if (meta_mine && (kGeneric || odd == 0 || !p.pair)) {
      const int unit = (share.first + rel + odd) * (kGeneric ? 8 : 1);
      const uint32_t g = group_of(unit, p.group_magic);
      const char* values = meta_from + static_cast<uint64_t>(g) * static_cast<uint32_t>(meta_group);
      cp_async_zero(to + kPieces * 512, values, 16);
      if constexpr (kGeneric) {
        const int more = min(group_of(unit + 7, p.group_magic), p.groups - 1) - g;
        for (int i = 1; i <= more; ++i)
          cp_async_zero(to + kPieces * 512 + i * 256, values + static_cast<int64_t>(i) * meta_group,
                        16);
      }
    }
  }
  __device__ __forceinline__ void next_pair() {
    rel += 2 * share.column_parts;
#pragma unroll
    for (auto& f : from) f += 2 * share.column_parts * (kBits == 16 ? 128 : kBlockBytes);
    if (rel >= share.length) {
      rel = 2 * share.column_part;
      tile = share.part_of_tile(p, ++round);
      if (tile.count > 0) start_tile();
    }
  }
};

}  // namespace fastinfer::cuda
