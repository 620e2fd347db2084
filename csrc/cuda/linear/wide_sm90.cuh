// Packed weights times many tokens on Hopper (sm_90a): Y^T = W X^T with TMA and tensor cores.
//
// W is the A operand: its codes come to shared memory as they lie in the layout, a thread turns its
// codes into its own operand registers, nothing is shuffled. X is B: tiles [tokens][64 k], 128-byte
// swizzled by TMA, which also fills what lies past M and K with zeros. One CTA per SM: two producer
// threads (X; weights) and two to four consumer warpgroups, each kBlocks blocks of 64 weight rows x
// kTokens tokens.
//
// Scales:
//   kHalf        scales have x's type: w = (q - z) s is one 16-bit multiplication of exact (q - z)
//   kScratch     any type, few tokens: the products of exact (q - z) of one group add up in a
//                scratch accumulator, scaled in fp32 and added to the result at the group's end
//   neither      any type, 256 tokens: (q - z) s in fp32, rounded to 16 bits
// The weights of the first and the last kind are those of dequantize_weight, bit for bit.
//
// Work: tiles in persistent order; tiles beyond whole rounds may be given to clusters whose CTAs
// take a part of K each and send their sums to the CTA that adds them up, rank by rank.
#pragma once

#include "wide_sm90_multiply.cuh"

namespace fastinfer::cuda::wide {

// Every CTA of the cluster has its barrier for sums; where they go to the ring, no CTA uses it.
template <class Tile>
__device__ __forceinline__ void ready_for_sums() {
  if (Tile::kSumsInRing) cluster_arrive_shared();
  cluster_wait();
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    wide_kernel(const __grid_constant__ WideParams p, const __grid_constant__ CUtensorMap x_map,
                const __grid_constant__ CUtensorMap w_map, const int32_t k) {
  extern __shared__ char raw[];
  const WideShared<Tile> shared(raw);
  const int32_t ranks = p.split ? cluster_size() : 1, rank = p.split ? cluster_rank() : 0;
  if (threadIdx.x == 0) {
    ptx::tma_prefetch(&x_map);
    ptx::tma_prefetch(&w_map);
    for (int i = 0; i < Tile::kStages; ++i) {
      ptx::mbarrier_init(&shared.full[i], 2);
      ptx::mbarrier_init(&shared.empty[i], 128 * Tile::kGroups);
    }
    if (p.split) {
      ptx::mbarrier_init(shared.summed, 1);
      ptx::mbarrier_init_fence();
      const Job job = job_of<Tile>(p, p.first_tile + blockIdx.x / ranks, rank, ranks);
      ptx::mbarrier_arrive_expect(shared.summed, Finish<T, Tile>::sum_bytes(p, job, rank, ranks));
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (p.split && !Tile::kSumsInRing) cluster_arrive_shared();
  grid_launch_dependents();
  if (threadIdx.x < 128) {
    ptx::registers_give<Tile::kProducerRegisters>();
    if (threadIdx.x == 0) {
      grid_wait();
      produce_x<Tile>(p, &x_map, shared, rank, ranks);
    } else if (threadIdx.x == 32) {
      produce_weights<Tile>(p, &w_map, k, shared, rank, ranks);
    }
    __syncwarp();
    if (p.split) ready_for_sums<Tile>();
  } else {
    ptx::registers_take<Tile::kConsumerRegisters>();
    grid_wait();
    const int warp = threadIdx.x / 32;
    Multiply<T, Tile> consumer(p, shared, warp / 4 - 1, warp % 4,
                               static_cast<int>(threadIdx.x % 32), rank, ranks);
#pragma unroll 1
    for (int32_t tile = p.first_tile + blockIdx.x / ranks; tile < p.end_tile;
         tile += gridDim.x / ranks) {
      const Job job = job_of<Tile>(p, tile, rank, ranks);
      consumer.run(job, k);
      if (p.split) {  // the only tile of this cluster
        ready_for_sums<Tile>();
        consumer.send_sums(job);
        consumer.add_sums(job);
      } else {
        consumer.write(job);
      }
    }
  }
}

}  // namespace fastinfer::cuda::wide
