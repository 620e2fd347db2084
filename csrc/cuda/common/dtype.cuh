// Element types on the device: fp32 <-> fp16, bf16, fp8 e4m3, int8, index reads, dispatch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "../../cpu/dtype.h"

namespace fastinfer::cuda {

template <class T>
__device__ __forceinline__ float to_float(T x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    return static_cast<float>(x);
  }
}

// Round to nearest even; fp16 overflows to inf as IEEE says.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Two elements of a 16-bit type in a word.
template <class T>
struct PairOf;
template <>
struct PairOf<__half> {
  using Type = __half2;
};
template <>
struct PairOf<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};
template <class T>
__device__ __forceinline__ typename PairOf<T>::Type as_pair(uint32_t word) {
  return reinterpret_cast<const typename PairOf<T>::Type&>(word);
}
template <class Pair>
__device__ __forceinline__ uint32_t as_word(const Pair& pair) {
  static_assert(sizeof(Pair) == 4, "two 16-bit elements");
  return reinterpret_cast<const uint32_t&>(pair);
}

// fp8 e4m3 (no infinities, 0x7F is NaN): saturating at 448, round to nearest even, NaN stays NaN.
// `soft`: integer arithmetic as sm_80 needs it, also elsewhere (FASTINFER_FORCE_ARCH=80).
__device__ __forceinline__ uint8_t soft_e4m3(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 24 & 0x80u,
                 magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint8_t>(sign | 0x7Fu);
  if (magnitude >= 0x43E80000u) return static_cast<uint8_t>(sign | 0x7Eu);  // >= 464: saturates
  if (magnitude < 0x3C800000u) {  // < 2^-6: a multiple of 2^-9; adding 2^14 rounds to that
    const float rounded = __fadd_rn(__uint_as_float(magnitude), 16384.0f);
    return static_cast<uint8_t>(sign | (__float_as_uint(rounded) & 0xFu));
  }
  const uint32_t odd = magnitude >> 20 & 1u;
  const uint32_t rounded = (magnitude + 0x7FFFFu + odd) >> 20;  // 3 mantissa bits
  const uint32_t code = rounded - (120u << 3);                  // exponent bias 127 -> 7
  return static_cast<uint8_t>(sign | (code > 0x7Eu ? 0x7Eu : code));
}

__device__ __forceinline__ float soft_from_e4m3(uint8_t code) {
  // The code's exponent and mantissa, moved into fp32 with a bias that is 120 too small, times
  // 2^120.
  const uint32_t sign = (code & 0x80u) << 24, rest = code & 0x7Fu;
  if (rest == 0x7Fu) return __uint_as_float(sign | 0x7FC00000u);
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest << 20) * 0x1p120f));
}

__device__ __forceinline__ uint8_t to_e4m3(float x, bool soft) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  if (!soft) return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
#endif
  return soft_e4m3(x);
}

__device__ __forceinline__ float from_e4m3(uint8_t code, bool soft) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  if (!soft) {
    const __half_raw h = __nv_cvt_fp8_to_halfraw(code, __NV_E4M3);
    return __half2float(__half(h));
  }
#endif
  return soft_from_e4m3(code);
}

// int8: round to nearest even, saturating at +-127 / -128 as the hardware conversion does; NaN ->
// 0.
__device__ __forceinline__ int8_t to_int8(float x) {
  return static_cast<int8_t>(max(-127, min(127, __float2int_rn(x))));
}

// Value i of an int32 or int64 index array.
__device__ __forceinline__ int64_t index_at(const void* p, DType type, int64_t i) {
  return type == DType::i64 ? static_cast<const int64_t*>(p)[i] : static_cast<const int32_t*>(p)[i];
}

// f(T{}) with the device type of a float dtype (anything else is refused before).
template <class F>
int with_float(DType type, F&& f) {
  if (type == DType::f16) return f(__half{});
  if (type == DType::bf16) return f(__nv_bfloat16{});
  return f(float{});
}

}  // namespace fastinfer::cuda
