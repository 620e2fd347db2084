// The last step of every linear kernel: add the bias in fp32, round once to the output's dtype.
#pragma once

#include "linear.h"
#include "simd.h"

namespace fastinfer::cpu {
namespace {

// The value as it stands: keeps a product from being fused into a following addition, where a
// result must not depend on whether the ISA level has FMA.
FI_INLINE float rounded(float x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__SSE2__)
  asm("" : "+x"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

FI_INLINE void store_one(const LinearOut& out, int64_t m, int64_t n, float y) {
  with_float(out.dtype, [&](auto e) {
    using E = decltype(e);
    if (out.bias) y = rounded(y) + E::get(out.bias, n);
    E::set(out.data, m * out.stride + n, y);
  });
}

// count neighbouring channels from n on; lanes past count are not stored.
FI_INLINE void store_lanes(const LinearOut& out, int64_t m, int64_t n, int64_t count, vf y) {
  with_float(out.dtype, [&](auto e) {
    using E = decltype(e);
    if (count >= kLanes) {
      if (out.bias) y += E::load(out.bias, n);
      E::store(out.data, m * out.stride + n, y);
    } else {
      if (out.bias) y += load_partial<E>(out.bias, n, count);
      store_partial<E>(out.data, m * out.stride + n, count, y);
    }
  });
}

}  // namespace
}  // namespace fastinfer::cpu
