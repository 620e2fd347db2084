// Adding up partial results, each relative to a maximum of its own, that are in shared memory: by a
// thread alone, or with weights that the lanes of a row have made of maxima and sums.
#pragma once

#include "attend.cuh"

namespace fastinfer::cuda {

template <class A, class P>
struct Sums {
  static constexpr int kColumns = A::kColumns, kRowThreads = kColumns / 4;
  static constexpr int kWidth = kRowThreads < 32 ? kRowThreads : 32;
  // Pieces that are loaded before the first is added; more than one needs registers.
  static constexpr int kAhead = P::kPlain && kColumns <= 128 ? 4 : 1;

  // Four columns of a row, relative to its maximum.
  struct Sum {
    float4 o;
    float top, sum;
  };
  static constexpr int kRows = P::kRowsAtOnce;  // of a thread, for the latency of each step

  // Pieces in shared memory of kRows rows; `pair`: maximum and sum of
  // the first piece of each, `x`: its output.
  static __device__ __forceinline__ void add_pieces(int count, const uint32_t (&pair)[kRows],
                                                    uint32_t pair_step, const uint32_t (&x)[kRows],
                                                    uint32_t x_step, Sum (&s)[kRows]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) s[i] = {make_float4(0, 0, 0, 0), kMinusInf, 0.0f};
    constexpr bool kFours = kAhead == 4 && kRows == 1;
    int k = 0;
    if constexpr (kFours) {
#pragma unroll 1
      for (; k + 4 <= count; k += 4) {
        float top[4];
        load_four(pair[0] + k * pair_step, pair_step, top);
#pragma unroll
        for (int i = 0; i < 4; ++i) s[0].top = fmaxf(s[0].top, top[i]);
      }
    }
#pragma unroll 4
    for (; k < count; ++k)
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        s[i].top = fmaxf(s[i].top, shared_float(pair[i] + k * pair_step));
    k = 0;
    if constexpr (kFours) {
#pragma unroll 1
      for (; k + 4 <= count; k += 4) {
        float weight[4], sum[4];
        float4 v[4];
        load_four(pair[0] + k * pair_step, pair_step, weight);
        load_four(pair[0] + k * pair_step + 4, pair_step, sum);
        load_four(x[0] + k * x_step, x_step, v);
#pragma unroll
        for (int i = 0; i < 4; ++i) weight[i] = exp2_approx(weight[i] - finite_origin(s[0].top));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[0].sum += weight[i] * sum[i];
          add(weight[i], v[i], s[0].o);
        }
      }
    }
#pragma unroll 4
    for (; k < count; ++k)
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float2 piece = A::shared_pair(pair[i] + k * pair_step);
        const float weight = exp2_approx(piece.x - finite_origin(s[i].top));
        s[i].sum += weight * piece.y;
        add(weight, shared_float4(x[i] + k * x_step), s[i].o);
      }
  }

  // Of four pieces: all are asked for before any is used.
  static __device__ __forceinline__ void load_four(uint32_t at, uint32_t step, float (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = shared_float(at + i * step);
  }
  static __device__ __forceinline__ void load_four(uint32_t at, uint32_t step, float4 (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = shared_float4(at + i * step);
  }

  static __device__ __forceinline__ void add(float weight, const float4& v, float4& o) {
    o.x += weight * v.x, o.y += weight * v.y, o.z += weight * v.z, o.w += weight * v.w;
  }

  // Brings top and sum of a row up to date with `count` pairs, which
  // become their weights.
  static __device__ __forceinline__ void weigh(int lane, unsigned lanes, int count, uint32_t pairs,
                                               float& top, float& sum) {
    float own_top = kMinusInf, own_sum = 0.0f;
#pragma unroll 1
    for (int k = lane; k < count; k += kWidth) {
      const float2 s = A::shared_pair(pairs + k * 8);
      const float higher = fmaxf(own_top, s.x), origin = finite_origin(higher);
      own_sum = own_sum * exp2_approx(own_top - origin) + s.y * exp2_approx(s.x - origin);
      own_top = higher;
    }
    float higher = own_top;
#pragma unroll
    for (int i = 1; i < kWidth; i *= 2) higher = fmaxf(higher, __shfl_xor_sync(lanes, higher, i));
    higher = fmaxf(higher, top);
    const float origin = finite_origin(higher);
    own_sum *= exp2_approx(own_top - origin);
#pragma unroll
    for (int i = 1; i < kWidth; i *= 2) own_sum += __shfl_xor_sync(lanes, own_sum, i);
    sum = sum * exp2_approx(top - origin) + own_sum;
    top = higher;
#pragma unroll 1
    for (int k = lane; k < count; k += kWidth)
      store_shared(pairs + k * 8, exp2_approx(shared_float(pairs + k * 8) - origin));
    __syncwarp(lanes);
  }
  static __device__ __forceinline__ float shared_float(uint32_t address) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
    return x;
  }
  static __device__ __forceinline__ float4 shared_float4(uint32_t address) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
  }
  static __device__ __forceinline__ void store_shared(uint32_t address, float x) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
  }
};

}  // namespace fastinfer::cuda
