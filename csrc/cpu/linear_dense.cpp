// linear: Y = X W^T + bias with W as stored, [N,K] row by row, fp32 accumulation.
//
// A tile of T tokens x R channels keeps T*R vector accumulators; step i adds x[m, i..] * w[n, i..]
// lane by lane; every kRun steps it is added to a second one (one long fp32 sum costs accuracy) and
// the lanes are added in the fixed tree of simd.h at the end. Every output has its own accumulators
// whatever the tile, so its bits do not depend on T, R, M or the threads. A short tile points its
// missing rows at the last valid one and does not store them.
//
// Meant for few tokens (weights are read once, from memory; a block of kDenseBlock channels stays
// in cache for the other token tiles) and for batch-invariant calls of any M.
#ifndef __AVX512VNNI__  // that level uses the AVX-512 object
#include "linear_epilogue.h"

namespace fastinfer::cpu::FI_ISA {
namespace {

constexpr int64_t kRun = 128 * kLanes;

FI_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class E, int T, int R>
void dense_tile(const DenseParams& p, int64_t m0, int64_t n0, int64_t n_end) {
  const int64_t full = p.k / kLanes * kLanes, tail = p.k - full;
  const char *x[T], *w[R];
  for (int t = 0; t < T; ++t)
    x[t] = static_cast<const char*>(p.x) + least(m0 + t, p.m - 1) * p.x_stride * E::size;
  for (int r = 0; r < R; ++r)
    w[r] =
        static_cast<const char*>(p.weight) + least(n0 + r, n_end - 1) * p.weight_stride * E::size;
  vf total[T][R] = {};
  for (int64_t i = 0; i < full;) {
    vf acc[T][R] = {};
    for (const int64_t run_end = least(i + kRun, full); i < run_end; i += kLanes) {
      vf xs[T];
      for (int t = 0; t < T; ++t) xs[t] = E::load(x[t], i);
      for (int r = 0; r < R; ++r) {
        const vf ws = E::load(w[r], i);
        for (int t = 0; t < T; ++t) acc[t][r] += xs[t] * ws;
      }
    }
    for (int t = 0; t < T; ++t)
      for (int r = 0; r < R; ++r) total[t][r] += acc[t][r];
  }
  if (tail > 0) {
    vf xs[T];
    for (int t = 0; t < T; ++t) xs[t] = load_partial<E>(x[t], full, tail);
    for (int r = 0; r < R; ++r) {
      const vf ws = load_partial<E>(w[r], full, tail);
      for (int t = 0; t < T; ++t) total[t][r] += xs[t] * ws;
    }
  }
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r)
      if (m0 + t < p.m && n0 + r < n_end) store_one(p.out, m0 + t, n0 + r, sum(total[t][r]));
}

template <class E, int T, int R>
void dense_rows(const DenseParams& p, int64_t m0, int64_t n0, int64_t n_end) {
  for (int64_t n = n0; n < n_end; n += R) dense_tile<E, T, R>(p, m0, n, n_end);
}

}  // namespace

void linear_dense(const DenseParams& p, int64_t begin, int64_t end) {
  with_float(p.dtype, [&](auto e) {
    using E = decltype(e);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t n0 = b * kDenseBlock, n_end = least(n0 + kDenseBlock, p.n);
      for (int64_t m = 0; m < p.m;) {
        if (p.m - m >= 3) {
          dense_rows<E, 4, kLanes >= 16 ? 4 : 2>(p, m, n0, n_end);
          m += 4;
        } else {
          dense_rows<E, 1, 8>(p, m, n0, n_end);
          m += 1;
        }
      }
    }
  });
}

}  // namespace fastinfer::cpu::FI_ISA
#endif
