// Bulk copies to shared memory, completion counted by an mbarrier: contiguous bytes, and boxes for
// all CTAs of a cluster (sm_90).
#pragma once

#include "tma.cuh"

namespace fastinfer::cuda::ptx {

// `bytes` contiguous bytes (a multiple of 16, both ends 16-byte aligned).
__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, uint32_t bytes,
                                          uint64_t* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

// The box at (column c0, row c1) of a matrix, to `to` in every CTA of the cluster that `ranks` has
// a bit for; each one's barrier at this address counts the bytes.
__device__ __forceinline__ void tma_load_multicast(uint32_t to, const CUtensorMap* map,
                                                   uint64_t* barrier, int32_t c0, int32_t c1,
                                                   uint32_t ranks, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%3, %4, %5, %5}], [%2], %6, %7;" ::"r"(to),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(0),
      "h"(static_cast<uint16_t>(ranks)), "l"(policy)
      : "memory");
}

// Arrives at the barrier that lies at this address in CTA `rank` of the cluster. Orders no memory
// across CTAs (that costs a membar.gl): for buffers whose last use is behind this thread already.
__device__ __forceinline__ void mbarrier_arrive_at(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

}  // namespace fastinfer::cuda::ptx
