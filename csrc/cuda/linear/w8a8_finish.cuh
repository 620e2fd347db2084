// The end of w8a8_linear on every path: exact sums to output values.
#pragma once

#include "../../cpu/linear.h"
#include "../common/vec.cuh"

namespace fastinfer::cuda {

// float(sum - zero * weight_sum) * x_scale * weight_scale + bias: products and sum rounded one by
// one, as on the CPU. The subtraction wraps.
__device__ __forceinline__ float w8a8_value(int32_t sum, int32_t zero, int32_t weight_sum,
                                            float x_scale, float weight_scale, bool has_bias,
                                            float bias) {
  const auto exact = static_cast<int32_t>(
      static_cast<uint32_t>(sum) - static_cast<uint32_t>(weight_sum) * static_cast<uint32_t>(zero));
  const float y = __fmul_rn(__fmul_rn(static_cast<float>(exact), x_scale), weight_scale);
  return has_bias ? __fadd_rn(y, bias) : y;
}

// Value i of an f32, f16 or bf16 vector.
__device__ __forceinline__ float float_at(DType type, const void* p, int64_t i) {
  if (type == DType::f16) return __half2float(static_cast<const __half*>(p)[i]);
  if (type == DType::bf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
  return static_cast<const float*>(p)[i];
}

__device__ __forceinline__ void store_float(DType type, void* p, int64_t i, float v) {
  if (type == DType::f16)
    static_cast<__half*>(p)[i] = from_float<__half>(v);
  else if (type == DType::bf16)
    static_cast<__nv_bfloat16*>(p)[i] = from_float<__nv_bfloat16>(v);
  else
    static_cast<float*>(p)[i] = v;
}

// Two values of a 16-bit type in one word, `low` first.
__device__ __forceinline__ uint32_t pack_pair(DType type, float low, float high) {
  if (type == DType::f16) {
    const __half2 two = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&two);
  }
  const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&two);
}

}  // namespace fastinfer::cuda
