// out = act(gate) * up, fp32 arithmetic, one rounding to the element type (SwiGLU and GEGLU of
// Shazeer 2020).
//
//   silu(g)      = g * sigmoid(g)
//   gelu_erf(g)  = g * Phi(g), Phi(g) = erfc(-g / sqrt 2) / 2
//   gelu_tanh(g) = g * (1 + tanh(u)) / 2 = g * sigmoid(2u), u = sqrt(2 / pi) (g + 0.044715 g^3)
//
// (Hendrycks and Gimpel 2016.) Writing both GELUs without a difference of nearly equal numbers
// keeps the relative error at a few 1e-6 for negative g too.
#include "activation.h"

#include "quantize_row.h"
#include "simd.h"

namespace fastinfer::cpu::FI_ISA {
namespace {

// erfc(z) = t * exp(-z^2) * Q(t) with t = 1 / (1 + z / 2); Q is a Chebyshev fit of degree 8 for
// t in [0.15, 1] (relative error 5e-8; below that exp(-z^2) is 0 in fp32).
FI_INLINE vf normal_cdf(vf g) {
  const vf t = 1.0f / (1.0f + vabs(g) * 0.353553391f);
  vf q = splat(-0.0603703186f);
  q = q * t + 0.290812135f;
  q = q * t - 0.499813706f;
  q = q * t + 0.292060852f;
  q = q * t - 0.0358914137f;
  q = q * t + 0.206415027f;
  q = q * t + 0.242218822f;
  q = q * t + 0.282488018f;
  q = q * t + 0.282080531f;
  const vf upper = 0.5f * (q * t * vexp(-0.5f * (g * g)));  // Phi(-|g|)
  return g < splat(0.0f) ? upper : 1.0f - upper;
}

template <Activation A>
FI_INLINE vf activate(vf g) {
  if (A == Activation::silu) return g * vsigmoid(g);
  if (A == Activation::gelu_erf) return g * normal_cdf(g);
  return g * vsigmoid(1.59576912f * (g + 0.044715f * (g * g * g)));
}

// n elements; stores as O at y.
template <class E, class O, Activation A>
void gated(const char* gate, const char* up, char* y, int64_t n) {
  const int64_t full = n / kLanes * kLanes;
  for (int64_t i = 0; i < full; i += kLanes)
    O::store(y, i, activate<A>(E::load(gate, i)) * E::load(up, i));
  if (full < n) {
    const vf g = load_partial<E>(gate, full, n - full), u = load_partial<E>(up, full, n - full);
    store_partial<O>(y, full, n - full, activate<A>(g) * u);
  }
}

template <Activation A>
void gated_tiles(const GatedParams& p, int64_t begin, int64_t end) {
  const int64_t tiles = (p.inner + kActivationTile - 1) / kActivationTile;
  with_float(p.dtype, [&](auto e) {
    using E = decltype(e);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t r = item / tiles, first = item % tiles * kActivationTile;
      const int64_t left = p.inner - first, n = left < kActivationTile ? left : kActivationTile;
      const char* gate = row_of(p.shape, p.x, r, E::size) + first * E::size;
      gated<E, E, A>(gate, gate + p.inner * E::size,
                     row_of(p.shape, p.out, r, E::size) + first * E::size, n);
    }
  });
}

}  // namespace

void gated_activation(const GatedParams& p, int64_t begin, int64_t end) {
  if (p.activation == Activation::silu) {
    gated_tiles<Activation::silu>(p, begin, end);
  } else if (p.activation == Activation::gelu_erf) {
    gated_tiles<Activation::gelu_erf>(p, begin, end);
  } else {
    gated_tiles<Activation::gelu_tanh>(p, begin, end);
  }
}

void silu_and_mul_quant(const GatedQuantParams& p, float* scratch, int64_t begin, int64_t end) {
  const int64_t n = p.gated.inner;
  with_float(p.gated.dtype, [&](auto e) {
    using E = decltype(e);
    for (int64_t r = begin; r < end; ++r) {
      const char* gate = row_of(p.gated.shape, p.gated.x, r, E::size);
      gated<E, Elem<DType::f32>, Activation::silu>(gate, gate + n * E::size,
                                                   reinterpret_cast<char*>(scratch), n);
      quantize_row(scratch, n, p.q + r * n, p.scale + r, p.zeros ? p.zeros + r : nullptr);
    }
  });
}

}  // namespace fastinfer::cpu::FI_ISA
