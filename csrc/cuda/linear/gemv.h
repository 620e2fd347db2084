// Rows of a 16-bit weight times one to five tokens (gemv.cu): what the host decides. Pure.
#pragma once

#include <cstdint>

#include "skinny.h"

#ifdef __CUDACC__
#define FI_GEMV_BOTH __host__ __device__
#else
#define FI_GEMV_BOTH
#endif

namespace fastinfer::cuda {

constexpr int kGemvWarps = 8;
constexpr int kGemvColumns = 256 * kGemvWarps;  // of a step: 16 bytes per lane
// More than half a multiprocessor: then one CTA lies on each. Where two fit, a launch whose
// predecessor ends early on some multiprocessors has two CTAs there, and none on others.
constexpr int kGemvLeastShared = 116 * 1024;

// An instance: tokens, neighbouring rows per step, steps in the ring. More tokens leave less room
// beside X.
struct GemvKind {
  int tokens, rows, stages;
};
constexpr GemvKind kGemvKinds[] = {{1, 8, 5}, {2, 8, 3}, {4, 8, 3}, {5, 8, 3}};
constexpr int64_t gemv_steps(int64_t k) { return (k + kGemvColumns - 1) / kGemvColumns; }

struct GemvShared {
  int ring, sums, bytes;  // offsets; x comes first
};
FI_GEMV_BOTH constexpr GemvShared gemv_shared(GemvKind kind, int steps) {
  GemvShared s{};
  s.ring = kind.tokens * steps * kGemvColumns * 2;
  s.sums = s.ring + kind.stages * kind.rows * kGemvColumns * 2;
  s.bytes = s.sums + 2 * kGemvWarps * kind.rows * kind.tokens * 4;
  if (s.bytes < kGemvLeastShared) s.bytes = kGemvLeastShared;
  return s;
}

// The instance that serves m, or -1: X of all columns does not fit beside a ring.
constexpr int gemv_kind(int64_t m, int64_t k, int shared_bytes) {
  if (m < 1 || k < 1 || k > (1 << 20)) return -1;
  for (int i = 0; i < static_cast<int>(sizeof kGemvKinds / sizeof *kGemvKinds); ++i)
    if (m <= kGemvKinds[i].tokens &&
        gemv_shared(kGemvKinds[i], static_cast<int>(gemv_steps(k))).bytes <= shared_bytes)
      return i;
  return -1;
}
constexpr int gemv_tokens(int64_t m, int64_t k, int shared_bytes) {
  const int kind = gemv_kind(m, k, shared_bytes);
  return kind < 0 ? 0 : kGemvKinds[kind].tokens;
}
static_assert(gemv_tokens(1, 28672, 227 * 1024) == 1 && gemv_tokens(2, 28672, 227 * 1024) == 2);
static_assert(gemv_tokens(3, 14336, 227 * 1024) == 4 && gemv_tokens(3, 28672, 227 * 1024) == 0);
static_assert(gemv_tokens(1, 4096, 163 * 1024) == 2, "sm_80: the smaller ring");
static_assert(gemv_tokens(1, 4096, 99 * 1024) == 0 && gemv_tokens(6, 64, 227 * 1024) == 0);
static_assert(gemv_kind(5, 4096, 227 * 1024) == 3 && gemv_tokens(5, 14336, 227 * 1024) == 0);

// Tokens of a CTA: all of them, or of a tiny layer up to five of at most 20; 0: too many.
constexpr int64_t kGemvTiny = 1 << 18;
constexpr int64_t gemv_group(int64_t m, int64_t n, int64_t k) {
  return m <= 5 ? m : m <= 20 && n * k <= kGemvTiny ? 5 : 0;
}
static_assert(gemv_group(9, 1024, 192) == 5 && gemv_group(9, 4096, 4096) == 0);

// Rows in rounds: `rows` neighbours per CTA, CTAs in turn.
struct GemvRange {
  int begin, end;  // rows; none where end <= begin
};
FI_GEMV_BOTH constexpr GemvRange gemv_rows(int rows, int n, int ctas, int cta, int round) {
  const int begin = (round * ctas + cta) * rows;
  return {begin, begin + rows < n ? begin + rows : n};
}
static_assert(gemv_rows(8, 6144, 132, 131, 4).end == 5280);
static_assert(gemv_rows(8, 6144, 132, 0, 5).begin == 5280);
static_assert(gemv_rows(8, 61, 132, 7, 0).begin == 56 && gemv_rows(8, 61, 132, 7, 0).end == 61);
static_assert(gemv_rows(8, 61, 132, 8, 0).end <= gemv_rows(8, 61, 132, 8, 0).begin, "no row");

// What both kernels of rows (gemv.cu, gemv_mma.cu) are told.
struct GemvParams {
  const void* x;
  int64_t x_stride;
  const void* w;
  int64_t w_stride;
  void* out;
  int64_t out_stride;
  const void* bias;
  int m, n, k, steps;
  bool weights_first;
};
inline GemvParams gemv_params(const DenseLinear& p, int64_t steps, bool weights_first) {
  return {p.x,
          p.x_stride,
          p.w,
          p.w_stride,
          p.out,
          p.out_stride,
          p.bias,
          static_cast<int>(p.m),
          static_cast<int>(p.n),
          static_cast<int>(p.k),
          static_cast<int>(steps),
          weights_first};
}

bool gemv_dense_fits(const DenseLinear& p);
int gemv_dense(const DenseLinear& p, void* stream);

}  // namespace fastinfer::cuda
