// Rows of a 16-bit weight times one to four tokens (gemv.cu): what the host decides. Pure.
#pragma once

#include <cstdint>

#include "skinny.h"

#ifdef __CUDACC__
#define FI_GEMV_BOTH __host__ __device__
#else
#define FI_GEMV_BOTH
#endif

namespace fastinfer::cuda {

constexpr int kGemvTokens = 4;  // at most
constexpr int kGemvWarps = 8, kGemvRows = 4;
constexpr int kGemvColumns = 256 * kGemvWarps;  // of a step: 16 bytes per lane
constexpr int kGemvStageBytes = kGemvRows * kGemvColumns * 2;

// Tokens of the instance that serves m.
constexpr int gemv_instance(int64_t m) { return m <= 1 ? 1 : m <= 2 ? 2 : 4; }
constexpr int64_t gemv_steps(int64_t k) { return (k + kGemvColumns - 1) / kGemvColumns; }

struct GemvShared {
  int ring, sums, bytes;  // offsets; x comes first
};
FI_GEMV_BOTH constexpr GemvShared gemv_shared(int tokens, int steps, int stages) {
  GemvShared s{};
  s.ring = tokens * steps * kGemvColumns * 2;
  s.sums = s.ring + stages * kGemvStageBytes;
  s.bytes = s.sums + 2 * kGemvWarps * kGemvRows * tokens * 4;
  return s;
}

// Stages of the ring; 0: X of all columns does not fit beside a ring. Under programmatic launch as
// many as fit: so much has been read when the kernel in front ends, and no two CTAs of a launch
// come to lie on one multiprocessor while another has none. Alone a deep ring only starts later.
constexpr int gemv_stages(int64_t m, int64_t k, bool programmatic, int shared_bytes) {
  if (m < 1 || m > kGemvTokens || k < 1 || k > (1 << 20)) return 0;
  for (int stages : {12, 8, 6, 4}) {
    if (stages > 6 && !programmatic) continue;
    const int steps = static_cast<int>(gemv_steps(k));
    if (gemv_shared(gemv_instance(m), steps, stages).bytes <= shared_bytes) return stages;
  }
  return 0;
}
static_assert(gemv_stages(1, 4096, false, 227 * 1024) == 6);
static_assert(gemv_stages(1, 14336, true, 227 * 1024) == 12);
static_assert(gemv_stages(4, 4096, true, 227 * 1024) == 12);
static_assert(gemv_stages(4, 14336, true, 227 * 1024) == 6);
static_assert(gemv_stages(2, 28672, true, 227 * 1024) == 6);
static_assert(gemv_stages(4, 28672, true, 227 * 1024) == 0);
static_assert(gemv_stages(1, 4096, false, 99 * 1024) == 4);
static_assert(gemv_stages(5, 64, true, 227 * 1024) == 0);

bool gemv_dense_fits(const DenseLinear& p);
int gemv_dense(const DenseLinear& p, void* stream);

}  // namespace fastinfer::cuda
