// Which kernel serves `linear` on CUDA: pure host code, tested by the static_asserts below. Only
// sizes and types take part, never values.
#pragma once

#include <cstdint>

namespace fastinfer {

enum class DenseKernel {
  gemv,    // fp32 FMAs, one to five tokens, of tiny layers 20 (gemv.cu)
  skinny,  // mma.sync, up to 16 tokens per pass (skinny.cuh)
  cublas,
};

struct DenseCall {
  int64_t m, n, k;
  bool programmatic;  // the calling thread's launches are programmatic: the engine's
  bool batch_invariant;
};

// What is wanted; torch's product serves the calls whose dtype, strides or K a kernel cannot take.
// Measured on an H200 (docs/kernels/linear.md). Under programmatic launch a kernel of ours starts
// while the one in front still runs, which cuBLAS does not. Alone cuBLAS is ahead from three tokens
// on for weights around 230 MB, and from five tokens on. Tiny layers are ours for accuracy: for
// 40 x 96 in bf16, with a strided output, cuBLAS was off by 2.22e-3, where rounding the output
// costs 1.4e-3.
constexpr DenseKernel choose_dense_kernel(const DenseCall& c) {
  if (c.batch_invariant) return DenseKernel::skinny;
  const int64_t weights = c.n * c.k;
  if (c.m <= 4) {
    const bool behind =
        !c.programmatic && c.m >= 3 && weights >= 100'000'000 && weights <= 256'000'000;
    return behind ? DenseKernel::cublas : DenseKernel::gemv;
  }
  if (c.m <= 20 && weights <= 1 << 18) return DenseKernel::gemv;
  if (c.programmatic && c.m == 5) return DenseKernel::gemv;  // a check of four drafts
  return c.programmatic && c.m <= 8 && weights <= 30'000'000 ? DenseKernel::skinny
                                                             : DenseKernel::cublas;
}
static_assert(choose_dense_kernel({1, 28672, 4096, false, false}) == DenseKernel::gemv);
static_assert(choose_dense_kernel({2, 4096, 14336, false, false}) == DenseKernel::gemv);
static_assert(choose_dense_kernel({4, 28672, 4096, false, false}) == DenseKernel::cublas);
static_assert(choose_dense_kernel({4, 28672, 4096, true, false}) == DenseKernel::gemv);
static_assert(choose_dense_kernel({4, 128256, 4096, false, false}) == DenseKernel::gemv);
static_assert(choose_dense_kernel({5, 28672, 4096, true, false}) == DenseKernel::gemv);
static_assert(choose_dense_kernel({17, 1024, 192, true, false}) == DenseKernel::gemv);
static_assert(choose_dense_kernel({20, 1024, 192, false, false}) == DenseKernel::gemv);
static_assert(choose_dense_kernel({21, 1024, 192, true, false}) == DenseKernel::cublas);
static_assert(choose_dense_kernel({5, 28672, 4096, false, false}) == DenseKernel::cublas);
static_assert(choose_dense_kernel({13, 40, 96, false, false}) == DenseKernel::gemv);
static_assert(choose_dense_kernel({512, 57344, 8192, false, true}) == DenseKernel::skinny);
static_assert(choose_dense_kernel({1, 64, 64, true, true}) == DenseKernel::skinny);
static_assert(choose_dense_kernel({8, 4096, 4096, true, false}) == DenseKernel::skinny);
static_assert(choose_dense_kernel({8, 28672, 4096, true, false}) == DenseKernel::cublas);
static_assert(choose_dense_kernel({8, 4096, 4096, false, false}) == DenseKernel::cublas);

}  // namespace fastinfer
