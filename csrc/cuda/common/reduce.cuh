// Sums and maxima over a warp and over a block, in a fixed order: the result does not depend on
// when a warp arrives, and every thread gets the same bits.
#pragma once

#include <cuda_runtime.h>

namespace fastinfer::cuda {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

struct Sum {
  template <class T>
  __device__ __forceinline__ static T combine(T a, T b) {
    return a + b;
  }
};
struct Max {
  template <class T>
  __device__ __forceinline__ static T combine(T a, T b) {
    return a > b ? a : b;  // a NaN in b is dropped: callers keep track of NaN themselves
  }
};

template <class Op, class T>
__device__ __forceinline__ T warp_reduce(T x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane >>= 1) x = Op::combine(x, __shfl_xor_sync(kAllLanes, x, lane));
  return x;
}

// kThreads / 32 <= 32 warps. `scratch` holds 32 values of T in shared memory; it may be used again
// for the next reduction without a barrier in between (the function ends with one).
template <class Op, int kThreads, class T>
__device__ __forceinline__ T block_reduce(T x, T* scratch) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024, "whole warps, at most 32");
  constexpr int kWarps = kThreads / 32;
  x = warp_reduce<Op>(x);
  if constexpr (kWarps == 1) return x;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  T total = scratch[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) total = Op::combine(total, scratch[w]);
  __syncthreads();
  return total;
}

}  // namespace fastinfer::cuda
