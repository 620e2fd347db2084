// TMA boxes of matrices, to one CTA or to several of a cluster at once, and access to barriers and
// words in another CTA of the cluster.
#pragma once

#include "tma.cuh"

namespace fastinfer::cuda::ptx {

// The box at column c, row r of a matrix (dimensions 3 and 4 of its map are 1) to `to`, in this
// CTA.
__device__ __forceinline__ void tma_load_2d(uint32_t to, const CUtensorMap* map, uint64_t* barrier,
                                            int32_t c, int32_t r) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %5}], [%2];" ::"r"(to),
      "l"(map), "r"(shared_address(barrier)), "r"(c), "r"(r), "r"(0)
      : "memory");
}

// The same to the CTAs of the cluster in `mask`: to the same offset of each one's shared memory,
// counted by the barrier at the same offset there.
__device__ __forceinline__ void tma_load_2d_multicast(uint32_t to, const CUtensorMap* map,
                                                      uint64_t* barrier, int32_t c, int32_t r,
                                                      uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %6, %6}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(shared_address(barrier)), "r"(c), "r"(r), "h"(mask), "r"(0)
      : "memory");
}

// Arrives at CTA `rank`'s copy of the barrier. Without .release.cluster, which costs a membar.gl, a
// microsecond: what the barrier hands over has been read by wgmma, not written.
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

// The word that lies in CTA `rank` where `local` lies in this one.
__device__ __forceinline__ int32_t load_from(uint32_t local, uint32_t rank) {
  int32_t v;
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.s32 %0, [remote];\n"
      "}"
      : "=r"(v)
      : "r"(local), "r"(rank)
      : "memory");
  return v;
}

}  // namespace fastinfer::cuda::ptx
