// The last step of every linear kernel: add the bias in fp32, round once to the output's dtype.
#pragma once

#include "linear.h"
#include "simd.h"

namespace fastinfer::cpu {
namespace {

FI_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The value as it stands: keeps a product from being fused into a following addition, where a
// result must not depend on whether the ISA level has FMA.
FI_INLINE vf rounded(vf x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__SSE2__)
  asm("" : "+x"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

template <class E>
FI_INLINE vf load_some(const void* p, int64_t i, int64_t count) {
  return count >= kLanes ? E::load(p, i) : load_partial<E>(p, i, count);
}

// count neighbouring channels from n on; lanes past count are not stored.
FI_INLINE void store_lanes(const LinearOut& out, int64_t m, int64_t n, int64_t count, vf y) {
  with_float(out.dtype, [&](auto e) {
    using E = decltype(e);
    if (out.bias) y = rounded(y) + load_some<E>(out.bias, n, count);
    if (count >= kLanes)
      E::store(out.data, m * out.stride + n, y);
    else
      store_partial<E>(out.data, m * out.stride + n, count, y);
  });
}

}  // namespace
}  // namespace fastinfer::cpu
