// The end of a tile of the wgmma kernel: a thread's sums plus bias, rounded, through shared memory
// to rows of Y in 16-byte pieces; where the CTAs of a cluster cut K, added up first.
//
// Sums of a thread and block, acc[8 u + i]: 16 tokens (unit u) x the warp's 16 rows, in the order
// of the tensor cores' results.
#pragma once

#include "../ptx/cluster.cuh"
#include "load_shared.cuh"
#include "wide_sm90_dequant.cuh"
#include "wide_sm90_load.cuh"

namespace fastinfer::cuda::wide {

template <class T, class Tile>
struct Finish {
  static constexpr int kBlocks = Tile::kBlocks, kUnits = Tile::kTokens / 16;  // units of a block
  static constexpr bool kBf16 = !std::is_same_v<T, __half>;

  const WideParams& p;
  const WideShared<Tile>& shared;
  const int group, warp, lane;  // warpgroup; warp of it
  const int32_t rank, ranks;    // in the cluster
  float acc[kBlocks][Tile::kAccumulators];

  // Block b of this warpgroup is part of the tile.
  __device__ __forceinline__ bool owned(int b) const { return group * kBlocks + b < p.tile_blocks; }
  // One unit of sums to slot `slot` of the staging area.
  __device__ __forceinline__ void stage(const float* v, int slot, const float (&bias)[2]) {
    uint32_t r[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      r[i] = pack_half2<kBf16>(v[2 * i] + bias[i % 2], v[2 * i + 1] + bias[i % 2]);
    const int token = 16 * slot + lane / 16 * 8 + lane % 8, chunk = 2 * warp + lane / 8 % 2;
    const uint32_t at =
        shared.out + group * Tile::kOutGroup + token * 128 + ((chunk ^ token % 8) << 4);
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
  }
  // The staged slots to Y, from `token` on.
  __device__ __forceinline__ void store(int slots, int32_t token, int32_t block) {
    ptx::named_sync(1 + group, 128);
    const int thread = threadIdx.x % 128, chunk = thread % 8;
    const int32_t column = block * 64 + chunk * 8, columns = min(8, p.n - column);
    for (int row = thread / 8; row < 16 * slots; row += 16) {
      const int32_t t = token + row;
      const uint4 v =
          load_shared(shared.out + group * Tile::kOutGroup + row * 128 + ((chunk ^ row % 8) << 4));
      if (t >= p.m || columns <= 0) continue;
      uint16_t* const to = static_cast<uint16_t*>(p.out) + t * p.out_stride + column;
      if (columns == 8 && p.packed_out) {
        *reinterpret_cast<uint4*>(to) = v;
      } else {
        const uint32_t pair[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int c = 0; c < 8; ++c)
          if (c < columns) to[c] = static_cast<uint16_t>(pair[c / 2] >> c % 2 * 16);
      }
    }
    ptx::named_sync(1 + group, 128);
  }
  __device__ __forceinline__ void load_bias(int32_t block, float (&bias)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int32_t row = block * 64 + 16 * warp + 8 * h + lane / 4;
      bias[h] = p.bias && row < p.n ? to_float(static_cast<const T*>(p.bias)[row]) : 0.0f;
    }
  }

  __device__ __forceinline__ void write(const Job& job) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const int32_t block = job.block + group * kBlocks + b;
      if (!owned(b) || block >= p.blocks) continue;
      float bias[2];
      load_bias(block, bias);
      constexpr int kSlots = kUnits < 4 ? kUnits : 4;
#pragma unroll
      for (int chunk = 0; chunk < kUnits / kSlots; ++chunk) {
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot)
          stage(acc[b] + (chunk * kSlots + slot) * 8, slot, bias);
        store(kSlots, job.token + 64 * chunk, block);
      }
    }
  }

  // Split K: rank v % ranks adds up unit v of the tile. Sums are sent to it, not fetched: a write
  // to another CTA waits for nothing, and its barrier counts the bytes (no fence, and nobody has to
  // stay until others have read).
  __device__ __forceinline__ void send_sums(const Job& job) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      if (!owned(b) || job.block + group * kBlocks + b >= p.blocks) continue;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const int v = (group * kBlocks + b) * kUnits + u, slot = v / ranks;
        const uint32_t owner = v - slot * ranks;
        uint32_t to = shared.sums + (slot * ranks + rank) * kSumUnitBytes + threadIdx.x % 128 * 16;
        uint32_t barrier = ptx::shared_address(shared.summed);
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(to), "r"(owner));
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(barrier) : "r"(barrier), "r"(owner));
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float* a = acc[b] + u * 8 + h * 4;
          asm volatile(
              "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, "
              "%3, %4}, [%5];" ::"r"(to + h * (kSumUnitBytes / 2)),
              "f"(a[0]), "f"(a[1]), "f"(a[2]), "f"(a[3]), "r"(barrier)
              : "memory");
        }
      }
    }
  }
  // In the order of the ranks: the same bits every time.
  __device__ __forceinline__ void add_sums(const Job& job) {
    ptx::mbarrier_wait(shared.summed, 0);
#pragma unroll 1
    for (int slot = group; slot * ranks + rank < p.tile_blocks * kUnits; slot += Tile::kGroups) {
      const int v = slot * ranks + rank;
      const int32_t block = job.block + v / kUnits;
      if (block >= p.blocks) break;
      float bias[2], sum[8] = {};
      load_bias(block, bias);
      const uint32_t from = shared.sums + slot * ranks * kSumUnitBytes + threadIdx.x % 128 * 16;
#pragma unroll 2
      for (int32_t r = 0; r < ranks; ++r)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint4 w = load_shared(from + r * kSumUnitBytes + h * (kSumUnitBytes / 2));
          sum[4 * h] += __uint_as_float(w.x), sum[4 * h + 1] += __uint_as_float(w.y);
          sum[4 * h + 2] += __uint_as_float(w.z), sum[4 * h + 3] += __uint_as_float(w.w);
        }
      stage(sum, 0, bias);
      store(1, job.token + 16 * (v % kUnits), block);
    }
  }
  // Bytes that this CTA will be sent.
  static __device__ __forceinline__ uint32_t sum_bytes(const WideParams& p, const Job& job,
                                                       int32_t rank, int32_t ranks) {
    const int units = min(p.tile_blocks, p.blocks - job.block) * kUnits;
    return units > rank ? (units - rank + ranks - 1) / ranks * ranks * kSumUnitBytes : 0;
  }
};

}  // namespace fastinfer::cuda::wide
