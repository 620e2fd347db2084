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
constexpr int kGemvWarps = 8, kGemvRows = 4, kGemvStages = 6;
constexpr int kGemvColumns = 256 * kGemvWarps;  // of a step: 16 bytes per lane
constexpr int kGemvStageBytes = kGemvRows * kGemvColumns * 2;

struct GemvShared {
  int ring, sums, bytes;  // offsets; x comes first
};
FI_GEMV_BOTH constexpr GemvShared gemv_shared(int tokens, int steps) {
  GemvShared s{};
  s.ring = tokens * steps * kGemvColumns * 2;
  s.sums = s.ring + kGemvStages * kGemvStageBytes;
  s.bytes = s.sums + 2 * kGemvWarps * kGemvRows * tokens * 4;
  return s;
}
static_assert(2 * (gemv_shared(1, 2).bytes + 1024) <= 228 * 1024, "two launches side by side");

// Tokens of the instance that serves m.
constexpr int gemv_instance(int64_t m) { return m <= 1 ? 1 : m <= 2 ? 2 : 4; }

// Whether x of all columns fits beside the ring.
constexpr bool gemv_fits(int64_t m, int64_t k, int shared_bytes) {
  if (m < 1 || m > kGemvTokens || k < 1 || k > (1 << 20)) return false;
  const int64_t steps = (k + kGemvColumns - 1) / kGemvColumns;
  return gemv_shared(gemv_instance(m), static_cast<int>(steps)).bytes <= shared_bytes;
}
static_assert(gemv_fits(1, 28672, 227 * 1024) && gemv_fits(2, 28672, 227 * 1024));
static_assert(gemv_fits(4, 14336, 227 * 1024) && !gemv_fits(4, 28672, 227 * 1024));
static_assert(!gemv_fits(5, 64, 227 * 1024) && !gemv_fits(1, 14336, 100 * 1024));

bool gemv_dense_fits(const DenseLinear& p);
int gemv_dense(const DenseLinear& p, void* stream);

}  // namespace fastinfer::cuda
