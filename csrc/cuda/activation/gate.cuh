// act(gate) in fp32 (formulas and sources: csrc/cpu/activation.cpp):
//
//   silu(g)      = g / (1 + e^-g)
//   gelu_erf(g)  = g * Phi(g)
//   gelu_tanh(g) = silu-like: g / (1 + e^-2u), u = sqrt(2 / pi) (g + 0.044715 g^3)
//
// None subtracts nearly equal numbers, so that the relative error stays at a few 1e-6 for negative
// g too. For 16-bit elements e^x is one hardware exponential whose argument carries a rounding,
// 1e-5 at the most, a hundredth of the rounding of the result; for fp32 it is expf.
#pragma once

#include <cuda_runtime.h>

#include "../../cpu/activation.h"

namespace fastinfer::cuda {

// 1 / d within 1 ulp, 0 for d = inf.
__device__ __forceinline__ float reciprocal(float d) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
  return r;
}

template <class E>
__device__ __forceinline__ float exponential(float x) {
  if (sizeof(E) == 4) return expf(x);
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
  return y;
}

template <class E>
__device__ __forceinline__ float over_one_plus_exp(float x, float t) {
  return x * reciprocal(1.0f + exponential<E>(-t));
}

// erfc(z) = s * exp(-z^2) * Q(s) with s = 1 / (1 + z / 2); Q is a Chebyshev fit of degree 8.
template <class E>
__device__ __forceinline__ float normal_cdf(float g) {
  const float s = reciprocal(1.0f + fabsf(g) * 0.353553391f);
  float q = -0.0603703186f;
  q = q * s + 0.290812135f;
  q = q * s - 0.499813706f;
  q = q * s + 0.292060852f;
  q = q * s - 0.0358914137f;
  q = q * s + 0.206415027f;
  q = q * s + 0.242218822f;
  q = q * s + 0.282488018f;
  q = q * s + 0.282080531f;
  const float upper = 0.5f * (q * s * exponential<E>(-0.5f * (g * g)));  // Phi(-|g|)
  return g < 0.0f ? upper : 1.0f - upper;
}

template <cpu::Activation kKind, class E>
__device__ __forceinline__ float activate(float g) {
  if (kKind == cpu::Activation::silu) return over_one_plus_exp<E>(g, g);
  if (kKind == cpu::Activation::gelu_erf) return g * normal_cdf<E>(g);
  return over_one_plus_exp<E>(g, 1.59576912f * (g + 0.044715f * (g * g * g)));
}

}  // namespace fastinfer::cuda
