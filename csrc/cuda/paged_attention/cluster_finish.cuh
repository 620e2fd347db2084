// The end of a piece where the CTAs of a cluster have parts of the same keys (sm_90): every warp
// leaves its state in shared memory, and each CTA adds up some columns of all of them. No counter,
// no way to memory and back. An item that several clusters share is put together once more, from
// memory, by the last CTA to come of each rank.
#pragma once

#include "../ptx/cluster.cuh"
#include "finish.cuh"

namespace fastinfer::cuda {

template <class A, class P>
struct ClusterFinish {
  using F = Finish<A, P>;
  using L = typename A::L;
  static constexpr int kRowThreads = F::kRowThreads;
  static constexpr int kLog = kRowThreads == 32 ? 5 : 4;
  static constexpr int kMostParts = 8;
  const F& finish;
  const P& p;
  const Slot& slot;

  __device__ __forceinline__ int size() const { return 1 << p.cluster_shift; }
  __device__ __forceinline__ int rank() const { return blockIdx.x & (size() - 1); }
  __device__ __forceinline__ int first_piece() const {
    return (slot.b * p.lanes + slot.lane) << p.parts_shift;
  }
  __device__ __forceinline__ float* partial(int k) const {
    return finish.partial(first_piece() + k);
  }
  __device__ __forceinline__ float2* pair(int k) const {
    const int index = ((first_piece() + k) << p.cluster_shift) + rank();
    return reinterpret_cast<float2*>(p.partial_ml) + index * finish.block_rows();
  }

  __device__ __forceinline__ void run(A& a) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    a.close();
    __syncwarp();  // the others may still read the slice
    float* own = reinterpret_cast<float*>(finish.shared + warp * L::kSlice);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane / 4 + 8 * i;
      if (row >= finish.item.rows) continue;
      a.store(own, i, a.to_own_max(p, i));
      if (lane % 4 == 0) finish.states()[warp * 16 + row] = make_float2(a.m[i], a.l[i]);
    }
    cluster_sync_shared();
    // A CTA adds up `vec` times four columns, a lane those of one CTA, a warp takes every fourth
    // row.
    const int vec = kRowThreads >> p.cluster_shift,
              column = (rank() * vec + (lane & (vec - 1))) * 4;
    const bool leads = lane < vec && column < p.dim;
#pragma unroll 1
    for (int row = warp; row < finish.item.rows; row += P::kWarps) {
      float top, sum;
      const float4 o = add_cluster(row, column, vec, top, sum);
      if (!leads) continue;
      if (slot.parts == 1) {
        finish.emit(row, column, o, top, sum);
        continue;
      }
      asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(partial(slot.part) +
                                                                    row * p.dim + column),
                   "f"(o.x), "f"(o.y), "f"(o.z), "f"(o.w)
                   : "memory");
      if (lane == 0) pair(slot.part)[row] = make_float2(top, sum);
    }
    cluster_arrive();  // has read what it needs
    if (slot.parts > 1) {
      int32_t* const counter =
          p.counters + ((slot.b * p.lanes + slot.lane) << p.cluster_shift) + rank();
      if (finish.arrive(counter, slot.parts)) {
        if (leads)
#pragma unroll 1
          for (int row = warp; row < finish.item.rows; row += P::kWarps) add_parts(row, column);
        if (threadIdx.x == 0) *counter = 0;
      }
    }
    cluster_wait();  // nobody ends before the others have read
  }

  // Four columns of a row, of all warps of the cluster; every lane of a column has the sum.
  __device__ __forceinline__ float4 add_cluster(int row, int column, int vec, float& top,
                                                float& sum) const {
    const int lane = threadIdx.x % 32, from = lane >> (kLog - p.cluster_shift) & (size() - 1);
    const float2* const pairs = finish.states() + row;
    const char* const x = finish.shared + (row * L::kMergePitch + column) * 4;
    uint64_t ml[P::kWarps];
    uint4 v[P::kWarps];
#pragma unroll
    for (int w = 0; w < P::kWarps; ++w) {
      ml[w] = cluster_load(reinterpret_cast<const uint64_t*>(pairs + w * 16), from);
      v[w] = cluster_load(reinterpret_cast<const uint4*>(x + w * L::kSlice), from);
    }
    float m[P::kWarps];
    top = kMinusInf;
#pragma unroll
    for (int w = 0; w < P::kWarps; ++w) {
      m[w] = __uint_as_float(static_cast<uint32_t>(ml[w]));
      top = fmaxf(top, m[w]);
    }
#pragma unroll 1
    for (int i = vec; i < kRowThreads; i *= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, i));
    const float origin = finite_origin(top);
    float4 o = make_float4(0, 0, 0, 0);
    sum = 0.0f;
#pragma unroll
    for (int w = 0; w < P::kWarps; ++w) {
      const float weight = exp2_approx(m[w] - origin);
      sum += weight * __uint_as_float(static_cast<uint32_t>(ml[w] >> 32));
      o.x += weight * __uint_as_float(v[w].x), o.y += weight * __uint_as_float(v[w].y);
      o.z += weight * __uint_as_float(v[w].z), o.w += weight * __uint_as_float(v[w].w);
    }
#pragma unroll 1
    for (int i = vec; i < kRowThreads; i *= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, i);
      o.x += __shfl_xor_sync(kAllLanes, o.x, i), o.y += __shfl_xor_sync(kAllLanes, o.y, i);
      o.z += __shfl_xor_sync(kAllLanes, o.z, i), o.w += __shfl_xor_sync(kAllLanes, o.w, i);
    }
    return o;
  }

  __device__ __forceinline__ void add_parts(int row, int column) const {
    float2 ml[kMostParts];
    float4 v[kMostParts];
    float top = kMinusInf, sum = 0.0f;
    float4 o = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int k = 0; k < kMostParts; ++k) {
      if (k >= slot.parts) break;
      ml[k] = __ldcg(pair(k) + row);
      v[k] = __ldcg(reinterpret_cast<const float4*>(partial(k) + row * p.dim + column));
    }
#pragma unroll
    for (int k = 0; k < kMostParts; ++k)
      if (k < slot.parts) top = fmaxf(top, ml[k].x);
    const float origin = finite_origin(top);
#pragma unroll
    for (int k = 0; k < kMostParts; ++k) {
      if (k >= slot.parts) break;
      const float weight = exp2_approx(ml[k].x - origin);
      sum += weight * ml[k].y;
      o.x += weight * v[k].x, o.y += weight * v[k].y;
      o.z += weight * v[k].z, o.w += weight * v[k].w;
    }
    finish.emit(row, column, o, top, sum);
  }
};

}  // namespace fastinfer::cuda
