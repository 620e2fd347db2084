// Hopper kernel (sm_90a): TMA, wgmma, warp-specialised and persistent.
//
// A CTA is a producer warpgroup and kGroups consumer warpgroups of 64 query rows each. Warp 1 of
// the producer deals out tiles of work, warps 0 and 2 load Q and stream K and V tiles of kKeys keys
// through two rings of kStages buffers; the consumers hold S, P and O in registers.
//
//   S_j = Q K_j^T          runs together with   O += P_{j-1} V_{j-1}
//   softmax of S_j         runs under that product and, since the consumer groups take turns at
//                          issuing (named barriers), under the other group's products
//
// Keys go from the last visible tile to the first: masks come first and last, the tiles between
// need none. Tiles in shared memory are slabs of 64 columns, 128-byte swizzled, as TMA writes and
// wgmma reads them. Columns past head_dim are zeros from TMA. V rows that no row of the tile sees
// are overwritten with zeros before use (0 * NaN), K rows only give scores that are masked.
#pragma once

#include "../common/launch.cuh"
#include "flash_sm90_consume.cuh"
#include "flash_sm90_load.cuh"
#include "tensor_map.h"

namespace fastinfer::cuda::flash {

template <class T, class Tile, bool kModify>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kCtasPerSm)
    flash_sm90_kernel(const __grid_constant__ FlashAttentionParams p,
                      const __grid_constant__ CUtensorMap q_map,
                      const __grid_constant__ CUtensorMap k_map,
                      const __grid_constant__ CUtensorMap v_map,
                      const __grid_constant__ CUtensorMap out_map, const int64_t total,
                      const bool packed_out, const bool tma_out) {
  constexpr int kStages = Tile::kStages, kConsumerWarps = 4 * Tile::kGroups;
  extern __shared__ __align__(1024) char raw[];
  const uint32_t q_tile = ptx::shared_address(raw),
                 k_tiles = q_tile + Tile::kStagesQ * Tile::kQBytes;
  const uint32_t v_tiles = k_tiles + kStages * Tile::kTileBytes;
  auto& barriers = *reinterpret_cast<Sm90Barriers<Tile>*>(
      raw + (v_tiles + Tile::kStagesV * Tile::kTileBytes - q_tile));
  static_assert(sizeof(Sm90Barriers<Tile>) <= 768, "reserved in kSharedBytes");

  // The first dense unit of work needs nothing from memory.
  if (threadIdx.x == 32 && !p.cu_q) {
    Slot& slot = barriers.slots[0];
    slot.w = dense_work(p, blockIdx.x, Tile::kRows);
    set_keys<Tile>(p, slot);
    slot.valid = 1;
  }
  if (threadIdx.x == 0) {
    ptx::tma_prefetch(&q_map);
    ptx::tma_prefetch(&k_map);
    ptx::tma_prefetch(&v_map);
    for (int i = 0; i < Tile::kStagesQ; ++i)
      for (int g = 0; g < Tile::kGroups; ++g) {
        ptx::mbarrier_init(&barriers.q_full[i][g], 1);
        ptx::mbarrier_init(&barriers.q_empty[i][g], 4);
      }
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(&barriers.k_full[i], 1);
      ptx::mbarrier_init(&barriers.k_empty[i], kConsumerWarps);
    }
    for (int i = 0; i < Tile::kStagesV; ++i) {
      ptx::mbarrier_init(&barriers.v_full[i], 1);
      ptx::mbarrier_init(&barriers.v_empty[i], kConsumerWarps);
    }
    for (int i = 0; i < Tile::kSlots; ++i) {
      ptx::mbarrier_init(&barriers.slot_full[i], 1);
      ptx::mbarrier_init(&barriers.slot_empty[i], kConsumerWarps + 2);  // and two loaders
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  grid_wait();
  grid_launch_dependents();

  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    ptx::registers_give<Tile::kProducerRegisters>();
    const int warp = threadIdx.x / 32;
    if (warp == 0)
      load_queries_and_keys(p, &q_map, &k_map, barriers, q_tile, k_tiles);
    else if (warp == 1)
      deal_work(p, barriers, total);
    else if (warp == 2)
      load_values(p, &v_map, barriers, v_tiles);
  } else {
    ptx::registers_take<Tile::kConsumerRegisters>();
    Consumer<T, Tile, kModify> consumer(k_tiles, v_tiles, p, barriers, out_map, packed_out, tma_out,
                                        q_tile, warpgroup - 1);
    consumer.run();
  }
}

template <class T, class Tile, bool kModify>
int launch_sm90_tiles(const FlashAttentionParams& call, void* stream) {
  FlashAttentionParams p = call;
  p.box_rows = p.table ? box_rows(p.page_size, Tile::kKeys) : Tile::kKeys;
  CUtensorMap q, k, v, out;
  const int64_t rows_q = p.cu_q ? p.tokens_q : p.len_q;
  const int64_t rows_k = p.table ? p.page_size : p.cu_q ? p.tokens_k : p.len_k;
  const int64_t outer = p.table ? p.num_pages : p.cu_q ? 1 : p.batch;
  int error = tensor_map(q, p.q, p.dtype, p.head_dim, rows_q, p.heads_q, p.cu_q ? 1 : p.batch,
                         p.q_token, p.q_head, p.q_batch, 64);
  if (!error)
    error = tensor_map(k, p.k.data, p.dtype, p.head_dim, rows_k, p.heads_kv, outer, p.k.token,
                       p.k.head, p.k.page, p.box_rows);
  if (!error)
    error = tensor_map(v, p.v.data, p.dtype, p.head_dim, rows_k, p.heads_kv, outer, p.v.token,
                       p.v.head, p.v.page, p.box_rows);
  const bool packed_out = aligned16(p.out, {p.out_batch, p.out_token, p.out_head});
  // The output leaves through a buffer of Q where there are two.
  const bool tma_out = Tile::kStagesQ > 1 && packed_out && stride_suits_tma(p.out_token, 2) &&
                       stride_suits_tma(p.out_head, p.heads_q) &&
                       stride_suits_tma(p.out_batch, p.cu_q ? 1 : p.batch);
  if (!error && tma_out)
    error = tensor_map(out, p.out, p.dtype, p.head_dim, rows_q, p.heads_q, p.cu_q ? 1 : p.batch,
                       p.out_token, p.out_head, p.out_batch, 16);
  if (error) return error;
  const int64_t tiles = p.cu_q ? p.tokens_q / Tile::kRows + p.batch
                               : ceil_div(p.len_q, Tile::kRows) * int64_t{p.batch};
  const int64_t total = tiles * p.heads_q;
  if (total > kMaxTiles) return cudaErrorInvalidConfiguration;
  const int64_t room = Tile::kCtasPerSm * device_facts().sms;
  const int64_t ctas = total < room ? total : room;
  return launch(flash_sm90_kernel<T, Tile, kModify>, dim3(static_cast<unsigned>(ctas)),
                dim3(Tile::kThreads), Tile::kSharedBytes, stream, p, q, k, v, tma_out ? out : q,
                total, packed_out, tma_out);
}

template <class T, int kD, bool kModify>
int launch_sm90(const FlashAttentionParams& p, void* stream) {
  if constexpr (kD <= 128 && !kModify) {
    if (short_tiles(tiles_of_64(p), p.len_k, device_facts().sms))
      return launch_sm90_tiles<T, Sm90Tile<kD, true>, false>(p, stream);
  }
  return launch_sm90_tiles<T, Sm90Tile<kD>, kModify>(p, stream);
}

}  // namespace fastinfer::cuda::flash
