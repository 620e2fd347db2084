// Y[M, N] = X[M, K] W[N, K]^T + bias for few tokens: the weights pass once, at memory speed.
//
// Tensor cores compute Y^T = W X^T, so that a tile of 8 tokens wastes little. Weights are A in
// registers: packed words are already in the order of its fragments (linear_layout.h); rows of a
// 16-bit W are read in 16-byte pieces, which is the order of fragments of another, equally good
// numbering of the columns. X is B: staged once per CTA in shared memory, row by row.
//
// A tile is 64 rows of W. A team of `ranks` CTAs (on sm_90 a cluster) shares its columns, each an
// even share; teams take tiles in turn. Inside a CTA 16 warps split 64 rows and the columns of the
// share: warp = (row part, column part), a column part takes every 2nd, 4th, .. pair of 64-column
// blocks. Every warp streams its own blocks through a private ring of cp.async stages, across
// tiles, without a barrier; codes become exact 16-bit integers, sums over one group are scaled in
// fp32. At the end of a tile the column parts are added in order, then the ranks: their sums are
// exchanged through shared memory of the cluster while the next tile already runs, or through
// memory with the last CTA adding up. The order of every sum is fixed by N, K and the split.
//
// Weights are read before grid_wait(): they are older than the launch (launch.cuh).
#pragma once

#include <type_traits>

#include "../common/launch.cuh"
#include "../ptx/async_copy.cuh"
#include "../ptx/cluster.cuh"
#include "../ptx/mma.cuh"
#include "skinny_dequant.cuh"
#include "skinny_params.h"

namespace fastinfer::cuda {

template <int kBits>
struct SkinnyShape {
  static constexpr int kStrips = kBits == 16 ? 1 : 2;  // of 16 rows, per warp
  static constexpr int kRowParts = 4 / kStrips;
  static constexpr int kColumnParts = kSkinnyWarps / kRowParts;
  static constexpr int kPieces = kBits == 4 ? 2 : 4;  // 16-byte pieces per lane and block
  static constexpr int kXPad = kBits == 16 ? 32 : 8;  // elements: rows of x in different banks
};

template <bool kBf16>
__device__ __forceinline__ void mma_1688(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  if constexpr (kBf16) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
  }
}

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// Four neighbouring floats of a run-time type, as the 16 bytes at `raw` hold them.
__device__ __forceinline__ void four_floats(float (&v)[4], const uint4& raw, DType type) {
  if (type == DType::f32) {
    v[0] = __uint_as_float(raw.x), v[1] = __uint_as_float(raw.y);
    v[2] = __uint_as_float(raw.z), v[3] = __uint_as_float(raw.w);
  } else if (type == DType::bf16) {
    v[0] = __uint_as_float(raw.x << 16), v[1] = __uint_as_float(raw.x & 0xFFFF0000u);
    v[2] = __uint_as_float(raw.y << 16), v[3] = __uint_as_float(raw.y & 0xFFFF0000u);
  } else {
    const float2 a = __half22float2(*reinterpret_cast<const __half2*>(&raw.x));
    const float2 b = __half22float2(*reinterpret_cast<const __half2*>(&raw.y));
    v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y;
  }
}

// 4 values of `type` (u8, 16 or 32 bit) from `p` + i elements.
__device__ __forceinline__ void copy_four(uint32_t shared, const void* p, int64_t i, DType type) {
  const char* from = static_cast<const char*>(p);
  if (type == DType::f32) {
    cp_async_16(shared, from + i * 4, true);
  } else if (type == DType::u8) {
    cp_async_4(shared, from + i, true);
  } else {
    cp_async_8(shared, from + i * 2);
  }
}

// X of this rank's columns to shared memory, [m][x_pitch], zero beyond K.
template <class E>
__device__ __forceinline__ void stage_x(const SkinnyParams& p, E* to, int first_column,
                                        int columns) {
  const E* x = static_cast<const E*>(p.x);
  const int packs = columns / 8, total = p.m * packs;
  for (int i = threadIdx.x; i < total; i += kSkinnyThreads) {
    const int token = i / packs, c = (i - token * packs) * 8, column = first_column + c;
    const E* row = x + token * p.x_stride;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (p.x_packs && column + 8 <= p.k) {
      v = *reinterpret_cast<const uint4*>(row + column);
    } else {
      uint16_t e[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        e[j] = 0;
        if (column + j < p.k) {
          const int from = p.perm ? p.perm[column + j] : column + j;
          e[j] = reinterpret_cast<const uint16_t*>(row)[from];
        }
      }
      v = make_uint4(e[0] | e[1] << 16, e[2] | e[3] << 16, e[4] | e[5] << 16, e[6] | e[7] << 16);
    }
    *reinterpret_cast<uint4*>(to + token * p.x_pitch + c) = v;
  }
}

template <bool kBf16, int kBits, int kTiles, bool kGeneric, int kStages, int kMinBlocks>
__global__ void __launch_bounds__(kSkinnyThreads, kMinBlocks)
    skinny_kernel(const __grid_constant__ SkinnyParams p) {
  using E = std::conditional_t<kBf16, __nv_bfloat16, __half>;
  using Shape = SkinnyShape<kBits>;
  constexpr int kStrips = Shape::kStrips, kPieces = Shape::kPieces;
  constexpr int kColumnParts = Shape::kColumnParts, kBuffers = kTiles == 1 ? 2 : 1;
  static_assert(kBits != 16 || !kGeneric, "groups are for packed weights");
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g8 = lane / 4, t = lane % 4;
  const int row_part = warp % Shape::kRowParts, column_part = warp / Shape::kRowParts;
  const int team = blockIdx.x / p.ranks, rank = blockIdx.x - team * p.ranks;
  const int first = rank * p.slice, length = max(0, min(p.slice, p.steps - first));
  const SkinnyShared at =
      skinny_shared(p.m, p.x_pitch, kStages, p.slot_bytes, kColumnParts, kBuffers, p.ranks > 1);
  const uint32_t base = shared_address(shared);
  const uint32_t ring = base + at.ring + warp * p.slot_bytes;
  const uint32_t slot_step = kSkinnyWarps * p.slot_bytes;

  grid_launch_dependents();

  // ---- the stream of weights: blocks of this warp, tile after tile
  const auto next_block = [](int rel) { return rel & 1 ? rel + 2 * kColumnParts - 1 : rel + 1; };
  int load_tile = 2 * column_part < length ? team : p.tiles, load_rel = 2 * column_part;
  const auto load = [&](int stage) {
    if (load_tile < p.tiles) {
      const uint32_t to = ring + stage * slot_step;
      const int block = first + load_rel;
      if constexpr (kBits == 16) {
        const int column = block * 64 + 8 * t;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {  // (row g8 or g8 + 8, columns of 32)
          const int row = min(load_tile * kSkinnyRows + row_part * 16 + g8 + 8 * (i / 2), p.n - 1);
          const int c = column + 32 * (i % 2);
          const bool valid = c < p.k;
          cp_async_16(to + i * 512 + lane * 16,
                      static_cast<const E*>(p.w) + row * p.w_stride + (valid ? c : 0), valid);
        }
      } else {
        const char* from = static_cast<const char*>(p.w) +
                           (static_cast<int64_t>(load_tile) * p.steps + block) * (512 * kBits) +
                           row_part * (kPieces * 512) + lane * 16;
#pragma unroll
        for (int i = 0; i < kPieces; ++i)
          cp_async_16(to + i * 512 + lane * 16, from + i * 512, true);
        const uint32_t meta = to + kPieces * 512 + lane % 8 * 16 + lane / 8 * 128;
        const void* values = lane < 8 ? p.scales : p.zeros;
        const DType type = lane < 8 ? p.scale_dtype : p.zero_dtype;
        if constexpr (kGeneric) {
          const int g = group_of(block * 8, p.group_magic);
          const int last = group_of(block * 8 + 7, p.group_magic);
          if (lane < 16 && values)
            for (int i = g; i <= min(last, p.groups - 1); ++i)
              copy_four(meta + (i - g) * 256, values,
                        ((static_cast<int64_t>(i) * p.tiles + load_tile) * 8 + lane % 8) * 8 +
                            4 * row_part,
                        type);
        } else if (lane < 16 && values) {
          const int g = p.groups == 1 ? 0 : group_of(block, p.group_magic);
          copy_four(
              meta, values,
              ((static_cast<int64_t>(g) * p.tiles + load_tile) * 8 + lane % 8) * 8 + 4 * row_part,
              type);
        }
      }
      load_rel = next_block(load_rel);
      if (load_rel >= length) {
        load_rel = 2 * column_part;
        load_tile += p.teams;
      }
    }
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) load(i);

  // ---- x
  if (threadIdx.x < kSkinnyZeroBytes / 16)
    reinterpret_cast<uint4*>(shared)[threadIdx.x] = make_uint4(0, 0, 0, 0);
  grid_wait();
  stage_x(p, reinterpret_cast<E*>(shared + at.x), first * 64, length * 64);
  __syncthreads();

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

  float total[kStrips][kTiles][4], acc[kStrips][kTiles][4], sum[kTiles][4];
  const auto clear = [](auto& c) {
    for (auto& strip : c)
      for (auto& tile : strip)
#pragma unroll
        for (float& v : tile) v = 0.0f;
  };
  const bool sums = kGeneric && p.zeros != nullptr, float_zeros = p.zero_dtype != DType::u8;
  clear(acc);
#pragma unroll
  for (int i = 0; i < kTiles; ++i) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0.0f;
  int stage = 0, buffer = 0, waiting = -1;  // waiting: tile whose ranks' sums are under way

  // Adds the ranks' sums of tile `waiting` and writes this rank's share of it.
  const auto store = [&](int token, int row, int tile, float v) {
    const int64_t n = static_cast<int64_t>(tile) * kSkinnyRows + row;
    if (n >= p.n) return;
    if (p.bias) v = __fadd_rn(v, to_float(static_cast<const E*>(p.bias)[n]));
    static_cast<E*>(p.out)[token * p.out_stride + n] = from_float<E>(v);
  };
  const auto finish = [&](int which) {
    const float* mine = reinterpret_cast<const float*>(shared + at.sums) + which * p.m * 64;
    for (int e = rank * kSkinnyThreads + threadIdx.x; e < p.m * kSkinnyRows;
         e += p.ranks * kSkinnyThreads) {
      float v = cluster_load(mine + e, 0);
      for (int r = 1; r < p.ranks; ++r) v += cluster_load(mine + e, r);
      store(e / kSkinnyRows, e % kSkinnyRows, waiting, v);
    }
  };

  for (int tile = team; tile < p.tiles; tile += p.teams) {
    clear(total);
    for (int rel = 2 * column_part; rel < length; rel = next_block(rel)) {
      cp_async_wait<kStages - 2>();
      __syncwarp();
      load(stage == 0 ? kStages - 1 : stage - 1);
      const uint32_t slot = ring + stage * slot_step;
      stage = stage + 1 == kStages ? 0 : stage + 1;
      uint32_t w[kPieces][4];
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        // 8 bit: 32 bytes per lane; neighbours in fours take their halves in opposite order, for
        // the banks.
        const int swap = lane / 4 % 2;
        const uint32_t from = kBits == 8 ? slot + i / 2 * 1024 + lane * 32 + ((i % 2) ^ swap) * 16
                                         : slot + i * 512 + lane * 16;
        const uint4 v = load_shared(from);
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
      const uint32_t meta = slot + kPieces * 512 + g8 * 16;
      [[maybe_unused]] Int4Zero<kBf16> zero[kStrips];
      if constexpr (kBits == 4) {
        uint32_t z = 0x08080808u;
        if (!kGeneric && p.zeros) z = load_shared(meta + 128).x;
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
          zero[s].set(0, z >> (16 * s) & 0xFF);
          zero[s].set(1, z >> (16 * s + 8) & 0xFF);
        }
      }
      // Generic: group of the current 8 columns, counted from the block's first.
      [[maybe_unused]] int group = 0, boundary = 0, last_group = 0;
      if constexpr (kGeneric) {
        const int unit = (first + rel) * 8, g = group_of(unit, p.group_magic);
        boundary = (g + 1) * p.group_units - unit;
        last_group = p.groups - 1 - g;  // padding beyond K has none of its own
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {  // 32 columns
        uint32_t b[kTiles][4];
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          const uint32_t from = x_base[i] + ((rel * 128 + h * 64) & x_mask[i]);
          if constexpr (kBits == 16) {
            const uint4 v = load_shared(from);
            b[i][0] = v.x, b[i][1] = v.y, b[i][2] = v.z, b[i][3] = v.w;
          } else {
            ldmatrix_x4(b[i], from);
          }
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {  // 16 columns
          uint32_t a[kStrips][4];
#pragma unroll
          for (int s = 0; s < kStrips; ++s) {
            if constexpr (kBits == 4) {
              dequantize_int4<kBf16>(a[s], w[s][2 * h + j], zero[s]);
            } else if constexpr (kBits == 8) {
              dequantize_int8<kBf16>(a[s], w[2 * s + h][2 * j], w[2 * s + h][2 * j + 1]);
            } else {
              a[s][0] = w[h][2 * j], a[s][1] = w[2 + h][2 * j];
              a[s][2] = w[h][2 * j + 1], a[s][3] = w[2 + h][2 * j + 1];
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
                float scale[4], z[4] = {};
                four_floats(scale, load_shared(meta + group * 256), p.scale_dtype);
                if (sums) {
                  const uint4 raw = load_shared(meta + group * 256 + 128);
                  if (float_zeros) {
                    four_floats(z, raw, p.zero_dtype);
                  } else {
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                      z[e] = static_cast<float>(static_cast<int>(raw.x >> (8 * e) & 0xFF) -
                                                (1 << (kBits - 1)));
                  }
                }
#pragma unroll
                for (int s = 0; s < kStrips; ++s)
#pragma unroll
                  for (int i = 0; i < kTiles; ++i)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                      const int r = 2 * s + e / 2;
                      float v = acc[s][i][e], &to = total[s][i][e];
                      if (sums && !float_zeros) v = fmaf(-z[r], sum[i][e % 2], v);
                      to = fmaf(v, scale[r], to);
                      if (sums && float_zeros) to = fmaf(z[r], sum[i][e % 2], to);
                    }
                clear(acc);
#pragma unroll
                for (int i = 0; i < kTiles; ++i)
                  sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0.0f;
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
        if (!p.pair || (rel & 1) || rel + 1 == length) {
          float scale[4];
          four_floats(scale, load_shared(meta), p.scale_dtype);
#pragma unroll
          for (int s = 0; s < kStrips; ++s)
#pragma unroll
            for (int i = 0; i < kTiles; ++i)
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                total[s][i][e] = fmaf(acc[s][i][e], scale[2 * s + e / 2], total[s][i][e]);
                acc[s][i][e] = 0.0f;
              }
        }
      }
    }

    // ---- the end of a tile: column parts are added in order
    if constexpr (kBuffers == 1) __syncthreads();  // the previous tile's are read
    float* partial = reinterpret_cast<float*>(shared + at.partial) +
                     (kBuffers == 2 ? buffer : 0) * kColumnParts * p.m * kPartialPitch;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int token = 8 * i + 2 * t + e;
        if (token < p.m) {
          float* to =
              partial + (column_part * p.m + token) * kPartialPitch + row_part * 16 * kStrips + g8;
#pragma unroll
          for (int s = 0; s < kStrips; ++s) {
            to[16 * s] = total[s][i][e];
            to[16 * s + 8] = total[s][i][e + 2];
          }
        }
      }
    __syncthreads();
    if (p.clustered && waiting >= 0) {
      cluster_wait_shared();
      finish(buffer ^ 1);
    }
    for (int e = threadIdx.x; e < p.m * kSkinnyRows; e += kSkinnyThreads) {
      const int token = e / kSkinnyRows, row = e % kSkinnyRows;
      float v = partial[token * kPartialPitch + row];
#pragma unroll
      for (int c = 1; c < kColumnParts; ++c) v += partial[(c * p.m + token) * kPartialPitch + row];
      if (p.ranks == 1) {
        store(token, row, tile, v);
      } else if (p.clustered) {
        reinterpret_cast<float*>(shared + at.sums)[buffer * p.m * 64 + e] = v;
      } else {
        p.partial[(static_cast<int64_t>(tile) * p.ranks + rank) * p.m * kSkinnyRows + e] = v;
      }
    }
    if (p.clustered) {
      cluster_arrive_shared();
      waiting = tile;
      buffer ^= 1;
    } else {
      if (p.ranks > 1) {  // the last rank to come adds all up, in order
        __threadfence();
        __syncthreads();
        int* last = reinterpret_cast<int*>(shared + at.sums);
        if (threadIdx.x == 0) {
          const bool is_last =
              atomicAdd(p.tickets + tile, 1u) + 1 == static_cast<uint32_t>(p.ranks);
          if (is_last) p.tickets[tile] = 0;
          *last = is_last;
        }
        __syncthreads();
        if (*last) {
          __threadfence();
          const float* all = p.partial + static_cast<int64_t>(tile) * p.ranks * p.m * kSkinnyRows;
          for (int e = threadIdx.x; e < p.m * kSkinnyRows; e += kSkinnyThreads) {
            float v = __ldcg(all + e);
            for (int r = 1; r < p.ranks; ++r) v += __ldcg(all + r * p.m * kSkinnyRows + e);
            store(e / kSkinnyRows, e % kSkinnyRows, tile, v);
          }
        }
        __syncthreads();
      }
      if constexpr (kBuffers == 2) buffer ^= 1;
    }
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
