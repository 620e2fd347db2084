// TMA boxes of matrices, to one CTA or to several of a cluster at once, and access to barriers and
// words in another CTA of the cluster.
#pragma once

#include "tma.cuh"

namespace fastinfer::cuda::ptx {

// The box at column c, row r of a matrix (dimensions 3 and 4 of its map are 1) to `to`, in this
// CTA.
__device__ __forceinline__ void tma_load_2d(uint32_t to, const CUtensorMap* map, uint64_t* barrier,
                                            int32_t c, int32_t r, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5, %5}], [%2], %6;" ::"r"(to),
      "l"(map), "r"(shared_address(barrier)), "r"(c), "r"(r), "r"(0), "l"(policy)
      : "memory");
}

// The same to the CTAs of the cluster in `mask`: to the same offset of each one's shared memory,
// counted by the barrier at the same offset there.
__device__ __forceinline__ void tma_load_2d_multicast(uint32_t to, const CUtensorMap* map,
                                                      uint64_t* barrier, int32_t c, int32_t r,
                                                      uint16_t mask, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%3, %4, %6, %6}], [%2], %5, %7;" ::"r"(to),
      "l"(map), "r"(shared_address(barrier)), "r"(c), "r"(r), "h"(mask), "r"(0), "l"(policy)
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

// Address, in CTA `rank`, of what lies at `local` in this one.
__device__ __forceinline__ uint32_t address_at(uint32_t local, uint32_t rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
  return remote;
}

// 32 bytes, 16-byte aligned, of this CTA or of any in the cluster.
__device__ __forceinline__ void load_shared(uint32_t (&v)[8], uint32_t at) {
#pragma unroll
  for (int i = 0; i < 8; i += 4)
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[i]), "=r"(v[i + 1]), "=r"(v[i + 2]), "=r"(v[i + 3])
                 : "r"(at + 4 * i)
                 : "memory");
}
__device__ __forceinline__ float load_shared_float(uint32_t at) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
  return v;
}
__device__ __forceinline__ void load_shared_cluster(uint32_t (&v)[8], uint32_t at) {
#pragma unroll
  for (int i = 0; i < 8; i += 4)
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[i]), "=r"(v[i + 1]), "=r"(v[i + 2]), "=r"(v[i + 3])
                 : "r"(at + 4 * i)
                 : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t at, int32_t a, int32_t b) {
  asm volatile("st.shared.v2.s32 [%0], {%1, %2};" ::"r"(at), "r"(a), "r"(b) : "memory");
}

}  // namespace fastinfer::cuda::ptx
