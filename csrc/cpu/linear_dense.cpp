// linear: Y = X W^T + bias with W as stored, [N,K] row by row, fp32 accumulation.
//
// A block is T tokens x kDenseBlock channels. It walks K in runs of kRun: the tokens' run is staged
// as fp32 in the first-level cache, then tiles of T x R outputs multiply it with R weight rows, one
// vector accumulator per output. After a run the accumulator is added to the output's total (one
// long fp32 sum costs accuracy); at the end the lanes of the total are added in the fixed tree of
// simd.h. No step of that depends on T, R, M or the threads, so neither do the bits of an output.
// A step takes 2 * kLanes neighbouring elements as two vectors; bf16 splits them into even and odd
// ones, two instructions instead of four. A short tile repeats its last row and does not store it.
//
// Meant for few tokens (weights are read once, at memory speed) and for batch-invariant calls.
#ifndef __AVX512VNNI__  // that level uses the AVX-512 object
#include "linear_epilogue.h"

namespace fastinfer::cpu::FI_ISA {
namespace {

constexpr int64_t kStep = 2 * kLanes;
constexpr int64_t kRun = 64 * kLanes;

template <class E>
FI_INLINE void load_step(const char* p, vf& a, vf& b) {
  if constexpr (E::size == 2 && __is_same(E, Elem<DType::bf16>)) {
    const vu pairs = load_raw<vu>(p);
    a = (vf)(pairs << 16);
    b = (vf)(pairs & 0xffff0000u);
  } else {
    a = E::load(p, 0);
    b = E::load(p, kLanes);
  }
}

// The last, short step: `left` elements, then zeros.
template <class E>
FI_INLINE void load_last_step(const char* p, int64_t left, vf& a, vf& b) {
  alignas(64) char padded[kStep * E::size] = {};
  for (int64_t i = 0; i < left * E::size; ++i) padded[i] = p[i];
  load_step<E>(padded, a, b);
}

template <class E, int T, int R>
FI_INLINE void dense_tile(const float* staged, const char* const* w, int64_t count, vf* total) {
  vf acc[T][R] = {};
  const int64_t full = count / kStep * kStep;
  auto step = [&](int64_t i, bool last) __attribute__((always_inline)) {
    vf xa[T], xb[T];
    for (int t = 0; t < T; ++t) {
      xa[t] = load_raw<vf>(staged + t * kRun + i);
      xb[t] = load_raw<vf>(staged + t * kRun + i + kLanes);
    }
    for (int r = 0; r < R; ++r) {
      vf wa, wb;
      if (last)
        load_last_step<E>(w[r] + i * E::size, count - i, wa, wb);
      else
        load_step<E>(w[r] + i * E::size, wa, wb);
      for (int t = 0; t < T; ++t) acc[t][r] = acc[t][r] + xa[t] * wa + xb[t] * wb;
    }
  };
  for (int64_t i = 0; i < full; i += kStep) step(i, false);
  if (full < count) step(full, true);
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) total[t * kDenseBlock + r] += acc[t][r];
}

template <class E, int T, int R>
void dense_block(const DenseParams& p, int64_t m0, int64_t n0) {
  const int64_t channels = least(kDenseBlock, p.n - n0), tokens = least(T, p.m - m0);
  vf total[T * kDenseBlock] = {};
  alignas(64) float staged[T * kRun];
  for (int64_t k = 0; k < p.k; k += kRun) {
    const int64_t count = least(kRun, p.k - k);
    for (int t = 0; t < T; ++t) {
      const int64_t row = least(m0 + t, p.m - 1);
      const char* x = static_cast<const char*>(p.x) + (row * p.x_stride + k) * E::size;
      for (int64_t i = 0; i < count; i += kStep) {
        vf a, b;
        if (count - i >= kStep)
          load_step<E>(x + i * E::size, a, b);
        else
          load_last_step<E>(x + i * E::size, count - i, a, b);
        store_raw(staged + t * kRun + i, a);
        store_raw(staged + t * kRun + i + kLanes, b);
      }
    }
    for (int64_t n = 0; n < channels; n += R) {
      const char* w[R];
      for (int r = 0; r < R; ++r)
        w[r] = static_cast<const char*>(p.weight) +
               ((n0 + least(n + r, channels - 1)) * p.weight_stride + k) * E::size;
      dense_tile<E, T, R>(staged, w, count, total + n);
    }
  }
  for (int64_t t = 0; t < tokens; ++t) {
    alignas(64) float y[kDenseBlock] = {};
    for (int64_t n = 0; n < channels; ++n) y[n] = sum(total[t * kDenseBlock + n]);
    for (int64_t n = 0; n < channels; n += kLanes)
      store_lanes(p.out, m0 + t, n0 + n, channels - n, load_raw<vf>(y + n));
  }
}

}  // namespace

void linear_dense(const DenseParams& p, int64_t begin, int64_t end) {
  constexpr bool wide = kLanes >= 16;
  with_float(p.dtype, [&](auto e) {
    using E = decltype(e);
    for (int64_t b = begin; b < end; ++b)
      for (int64_t m = 0; m < p.m; m += 4) {
        if (p.m - m == 1)
          dense_block<E, 1, wide ? 8 : 4>(p, m, b * kDenseBlock);
        else if (p.m - m == 2)
          dense_block<E, 2, 4>(p, m, b * kDenseBlock);
        else
          dense_block<E, 4, wide ? 4 : 2>(p, m, b * kDenseBlock);
      }
  });
}

}  // namespace fastinfer::cpu::FI_ISA
#endif
