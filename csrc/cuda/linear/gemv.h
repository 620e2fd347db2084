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

constexpr int kGemvWarps = 8, kGemvRows = 8;
constexpr int kGemvColumns = 256 * kGemvWarps;  // of a step: 16 bytes per lane
constexpr int kGemvStageBytes = kGemvRows * kGemvColumns * 2;
// More than half a multiprocessor: then one CTA lies on each. Where two fit, a launch whose
// predecessor ends early on some multiprocessors has two CTAs there, and none on others.
constexpr int kGemvLeastShared = 116 * 1024;

// Stages of the ring; tokens: of the instance. More tokens leave less room beside X.
constexpr int gemv_stages(int tokens) { return tokens == 1 ? 5 : 3; }
constexpr int64_t gemv_steps(int64_t k) { return (k + kGemvColumns - 1) / kGemvColumns; }

struct GemvShared {
  int ring, sums, bytes;  // offsets; x comes first
};
FI_GEMV_BOTH constexpr GemvShared gemv_shared(int tokens, int steps) {
  GemvShared s{};
  s.ring = tokens * steps * kGemvColumns * 2;
  s.sums = s.ring + gemv_stages(tokens) * kGemvStageBytes;
  s.bytes = s.sums + 2 * kGemvWarps * kGemvRows * tokens * 4;
  if (s.bytes < kGemvLeastShared) s.bytes = kGemvLeastShared;
  return s;
}

// Tokens of the instance that serves m; 0: X of all columns does not fit beside a ring.
constexpr int gemv_tokens(int64_t m, int64_t k, int shared_bytes) {
  if (m < 1 || k < 1 || k > (1 << 20)) return 0;
  for (int tokens : {1, 2, 4, 5})
    if (m <= tokens && gemv_shared(tokens, static_cast<int>(gemv_steps(k))).bytes <= shared_bytes)
      return tokens;
  return 0;
}
static_assert(gemv_tokens(1, 28672, 227 * 1024) == 1 && gemv_tokens(2, 28672, 227 * 1024) == 2);
static_assert(gemv_tokens(3, 14336, 227 * 1024) == 4 && gemv_tokens(3, 28672, 227 * 1024) == 0);
static_assert(gemv_tokens(1, 4096, 163 * 1024) == 2, "sm_80: the smaller ring");
static_assert(gemv_tokens(1, 4096, 99 * 1024) == 0 && gemv_tokens(6, 64, 227 * 1024) == 0);
static_assert(gemv_tokens(5, 4096, 227 * 1024) == 5 && gemv_tokens(5, 14336, 227 * 1024) == 0);

// Tokens of a CTA: all of them, or of a tiny layer up to five of at most 20; 0: too many.
constexpr int64_t kGemvTiny = 1 << 18;
constexpr int64_t gemv_group(int64_t m, int64_t n, int64_t k) {
  return m <= 5 ? m : m <= 20 && n * k <= kGemvTiny ? 5 : 0;
}
static_assert(gemv_group(9, 1024, 192) == 5 && gemv_group(9, 4096, 4096) == 0);

// Rows in rounds: kGemvRows neighbours per CTA, CTAs in turn.
struct GemvRange {
  int begin, end;  // rows; none where end <= begin
};
FI_GEMV_BOTH constexpr GemvRange gemv_rows(int n, int ctas, int cta, int round) {
  const int begin = (round * ctas + cta) * kGemvRows;
  return {begin, begin + kGemvRows < n ? begin + kGemvRows : n};
}
static_assert(gemv_rows(6144, 132, 131, 4).end == 5280 && gemv_rows(6144, 132, 0, 5).begin == 5280);
static_assert(gemv_rows(61, 132, 7, 0).begin == 56 && gemv_rows(61, 132, 7, 0).end == 61);
static_assert(gemv_rows(61, 132, 8, 0).end <= gemv_rows(61, 132, 8, 0).begin, "no row");

bool gemv_dense_fits(const DenseLinear& p);
int gemv_dense(const DenseLinear& p, void* stream);

}  // namespace fastinfer::cuda
