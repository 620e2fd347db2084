// Rows of a 16-bit weight times up to eight tokens on the tensor cores (gemv_mma.cu): what the host
// decides. Pure.
#pragma once

#include <cstdint>

#include "gemv.h"

namespace fastinfer::cuda {

constexpr int kGemvMmaTokens = 8, kGemvMmaRows = 8;
constexpr int kGemvMmaColumns = 128 * kGemvWarps;  // of a step
constexpr int kGemvMmaStage = kGemvMmaRows * kGemvMmaColumns * 2;
// Steps in the ring: as many bytes under way as with one token, or what X leaves room for.
constexpr int kGemvMmaDeep = 9, kGemvMmaShallow = 5;

struct GemvMmaShared {
  int stages;  // 0: X does not fit
  int x_pitch, ring, sums, bytes;
};
constexpr GemvMmaShared gemv_mma_shared(int64_t m, int64_t k, int room) {
  GemvMmaShared s{};
  if (m < 1 || m > kGemvMmaTokens || k < 1 || k > (1 << 16)) return s;
  // Rows of X begin 16 bytes further, modulo 128, than the one before: ldmatrix meets no bank
  // twice.
  const int64_t steps = (k + kGemvMmaColumns - 1) / kGemvMmaColumns;
  s.x_pitch = static_cast<int>(steps * kGemvMmaColumns * 2 + 16);
  s.ring = (static_cast<int>(m) * s.x_pitch + 127) / 128 * 128;
  const int sums = 2 * kGemvWarps * kGemvMmaTokens * kGemvMmaRows * 4;
  for (const int stages : {kGemvMmaDeep, kGemvMmaShallow}) {
    s.sums = s.ring + stages * kGemvMmaStage;
    s.bytes = s.sums + sums;
    if (s.bytes < kGemvLeastShared) s.bytes = kGemvLeastShared;
    if (s.bytes > room) continue;
    s.stages = stages;
    break;
  }
  return s;
}
static_assert(gemv_mma_shared(8, 4096, 227 * 1024).stages == kGemvMmaDeep);
static_assert(gemv_mma_shared(5, 14336, 227 * 1024).stages == kGemvMmaShallow);
static_assert(gemv_mma_shared(6, 14336, 227 * 1024).stages == 0);
static_assert(gemv_mma_shared(9, 64, 227 * 1024).stages == 0, "tokens");
static_assert(gemv_mma_shared(5, 4096, 163 * 1024).stages == kGemvMmaShallow, "sm_80");
static_assert(gemv_mma_shared(3, 1024, 99 * 1024).stages == 0, "sm_86, sm_89");

bool gemv_mma_fits(const DenseLinear& p);
int gemv_mma_dense(const DenseLinear& p, void* stream);

}  // namespace fastinfer::cuda
