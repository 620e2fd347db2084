// Which kernel serves `linear` on CUDA: pure host code, tested by the static_asserts below. Only
// sizes and types take part, never values.
#pragma once

#include <cstdint>

namespace fastinfer {

enum class DenseKernel {
  gemv,    // fp32 FMAs, one to four tokens (gemv.cu)
  skinny,  // mma.sync, up to 16 tokens per pass (skinny.cuh)
  cublas,
};

struct DenseCall {
  int64_t m, n, k;
  bool programmatic;  // the calling thread's launches are programmatic: the engine's
  bool batch_invariant;
};

// What is wanted; the caller takes the next one where a kernel cannot run the call's dtype, strides
// or K.
constexpr DenseKernel choose_dense_kernel(const DenseCall& c) {
  if (c.batch_invariant) return DenseKernel::skinny;
  if (c.m <= 4) return DenseKernel::gemv;
  if (c.m <= 16 && c.n * c.k <= 65536) return DenseKernel::skinny;
  return c.programmatic && c.m <= 8 && c.n * c.k <= 30'000'000 ? DenseKernel::skinny
                                                               : DenseKernel::cublas;
}
static_assert(choose_dense_kernel({1, 4096, 14336, false, false}) == DenseKernel::gemv);
static_assert(choose_dense_kernel({13, 40, 96, false, false}) == DenseKernel::skinny);
static_assert(choose_dense_kernel({512, 57344, 8192, false, true}) == DenseKernel::skinny);
static_assert(choose_dense_kernel({1, 64, 64, true, true}) == DenseKernel::skinny);
static_assert(choose_dense_kernel({8, 4096, 4096, true, false}) == DenseKernel::skinny);
static_assert(choose_dense_kernel({8, 4096, 4096, false, false}) == DenseKernel::cublas);

}  // namespace fastinfer
