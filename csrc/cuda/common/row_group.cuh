// The threads that share a row (row_group.h) and their reductions: a fixed butterfly over lanes,
// then over warps, so that every thread gets the same bits at every call. One barrier per reduction
// of a row that spans warps, none within a warp.
#pragma once

#include "../../cpu/rows.h"
#include "launch.cuh"
#include "reduce.cuh"
#include "row_group.h"
#include "vec.cuh"

namespace fastinfer::cuda {

// Values of one reduction, one per warp, twice: the next reduction writes the other half while slow
// warps still read this one.
template <class T>
struct RowScratch {
  T value[2][32];
};

struct RowGroup {
  int threads, thread, row;  // of this row; the row's index in its block
  int warps, turn;

  // Rows that share a block have a power of two of threads.
  __device__ __forceinline__ explicit RowGroup(int row_threads) {
    threads = row_threads;
    row = shares() ? threadIdx.x >> (31 - __clz(threads)) : 0;
    thread = threadIdx.x - row * threads;
    warps = threads / 32;
    turn = 0;
  }

  __device__ __forceinline__ bool shares() const { return threads < static_cast<int>(blockDim.x); }
  // Index of the row among those of all blocks.
  __device__ __forceinline__ int64_t global_row() const {
    if (!shares()) return blockIdx.x;
    return static_cast<int64_t>(blockIdx.x) * (blockDim.x >> (31 - __clz(threads))) + row;
  }

  // Every thread of the block calls, also those without a row.
  template <class F, class T>
  __device__ __forceinline__ T reduce(T x, RowScratch<T>& scratch, F combine) {
#pragma unroll
    for (int lane = 16; lane > 0; lane >>= 1)
      if (lane < threads) x = combine(x, __shfl_xor_sync(kAllLanes, x, lane));
    if (warps <= 1) return x;
    T* values = scratch.value[turn];
    turn ^= 1;
    const int lane = threadIdx.x % 32;
    if (lane == 0) values[threadIdx.x / 32] = x;
    __syncthreads();
    // Lanes beyond the power of two above `warps` repeat the first ones; T{} stands for a warp that
    // the row does not have.
    const int span = 1 << (32 - __clz(warps - 1)), mine = lane & (span - 1);
    x = mine < warps ? values[row * warps + mine] : T{};
#pragma unroll
    for (int other = 16; other > 0; other >>= 1)
      if (other < span) x = combine(x, __shfl_xor_sync(kAllLanes, x, other));
    return x;
  }
};

// n / d for n >= 0, d > 0. A 64-bit division is a subroutine of a hundred instructions: only where
// it is needed.
__device__ __forceinline__ int64_t divide(int64_t n, int64_t d) {
  if (((n | d) >> 32) == 0) return static_cast<uint32_t>(n) / static_cast<uint32_t>(d);
  return n / d;
}

// Offset of row r in elements.
__device__ __forceinline__ int64_t row_offset_of(const cpu::RowShape& shape, const cpu::Rows& t,
                                                 int64_t r) {
  if (shape.ndim == 1) return r * t.stride[0];
  int64_t offset = 0;
#pragma unroll
  for (int d = cpu::kRowDims - 1; d > 0; --d) {
    if (d < shape.ndim) {
      const int64_t next = divide(r, shape.size[d]);
      offset += (r - next * shape.size[d]) * t.stride[d];
      r = next;
    }
  }
  return offset + r * t.stride[0];
}

// Host side: can the rows of a tensor be moved in packs?
inline bool row_packs(const cpu::RowShape& shape, const cpu::Rows& t, int64_t n,
                      int64_t element_size) {
  bool fit = packs_fit(t.data, n, element_size, {});
  for (int d = 0; d < shape.ndim; ++d)
    fit = fit && (shape.size[d] == 1 || t.stride[d] * element_size % 16 == 0);
  return fit;
}

// kSize elements of a vector of n (weights, tables) of a run-time float type as fp32; `packs`: 16
// bytes at a time.
template <int kSize, class T>
__device__ __forceinline__ void load_as(float (&v)[kSize], const T* p, int i, int n, bool packs) {
  constexpr int kStep = Pack<T>::kSize;
  static_assert(kSize % kStep == 0 || kStep % kSize == 0, "whole packs, or part of one");
  if constexpr (kSize >= kStep) {
#pragma unroll
    for (int k = 0; k < kSize; k += kStep) {
      float part[kStep];
      unpack<T>(part, load_pack(p, i + k, n, packs));
#pragma unroll
      for (int j = 0; j < kStep; ++j) v[k + j] = part[j];
    }
  } else {
#pragma unroll
    for (int j = 0; j < kSize; ++j) v[j] = i + j < n ? to_float(p[i + j]) : 0.0f;
  }
}

template <int kSize>
__device__ __forceinline__ void load_floats(float (&v)[kSize], const void* p, DType type, int i,
                                            int n, bool packs) {
  if (type == DType::f32) {
    load_as(v, static_cast<const float*>(p), i, n, packs);
  } else if (type == DType::f16) {
    load_as(v, static_cast<const __half*>(p), i, n, packs);
  } else {
    load_as(v, static_cast<const __nv_bfloat16*>(p), i, n, packs);
  }
}

}  // namespace fastinfer::cuda
