// Thread-block clusters (sm_90): rank, barrier, access to the shared memory of another CTA. Code
// for older architectures sees a cluster of one CTA; launch with more only what was compiled for
// sm_90.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastinfer::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t n;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
  return n;
}
// Barrier over all threads of the cluster. Orders shared memory only: what a CTA wrote into its own
// before, every other may read after. (A barrier that also orders global memory costs a
// membar.gl, about a microsecond. PTX ISA 8.6, fence.sync_restrict.)
__device__ __forceinline__ void cluster_sync_shared() {
  asm volatile("fence.release.sync_restrict::shared::cta.cluster;" ::: "memory");
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
  asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
}
// The same in two halves: arrive after the writes, wait before the reads of the others' memory.
// Every thread calls both, in turn.
__device__ __forceinline__ void cluster_arrive_shared() {
  asm volatile("fence.release.sync_restrict::shared::cta.cluster;" ::: "memory");
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait_shared() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
  asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
}
// In two halves, without ordering memory: a CTA that others read from ends behind it.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
// Address, in the shared memory of CTA `rank`, of what `local` is in this CTA.
__device__ __forceinline__ uint32_t cluster_map(const void* local, uint32_t rank) {
  uint32_t a;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(a)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(local))), "r"(rank));
  return a;
}
__device__ __forceinline__ float cluster_load(const float* local, uint32_t rank) {
  float v;
  asm volatile("ld.shared::cluster.f32 %0, [%1];"
               : "=f"(v)
               : "r"(cluster_map(local, rank))
               : "memory");
  return v;
}
__device__ __forceinline__ uint64_t cluster_load(const uint64_t* local, uint32_t rank) {
  uint64_t v;
  asm volatile("ld.shared::cluster.u64 %0, [%1];"
               : "=l"(v)
               : "r"(cluster_map(local, rank))
               : "memory");
  return v;
}
__device__ __forceinline__ uint4 cluster_load(const uint4* local, uint32_t rank) {
  uint4 v;
  asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(cluster_map(local, rank))
               : "memory");
  return v;
}

#else

__device__ __forceinline__ uint32_t cluster_rank() { return 0; }
__device__ __forceinline__ uint32_t cluster_size() { return 1; }
__device__ __forceinline__ void cluster_sync_shared() { __syncthreads(); }
__device__ __forceinline__ void cluster_arrive_shared() {}
__device__ __forceinline__ void cluster_wait_shared() { __syncthreads(); }
__device__ __forceinline__ float cluster_load(const float* local, uint32_t) { return *local; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
__device__ __forceinline__ uint64_t cluster_load(const uint64_t* local, uint32_t) { return *local; }
__device__ __forceinline__ uint4 cluster_load(const uint4* local, uint32_t) { return *local; }

#endif

}  // namespace fastinfer::cuda
