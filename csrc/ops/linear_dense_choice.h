// Which kernel serves `linear` on CUDA: pure host code, tested by the static_asserts below. Only
// sizes and types take part, never values.
#pragma once

#include <cstdint>

namespace fastinfer {

enum class DenseKernel {
  gemv,      // fp32 FMAs, one to four tokens, of tiny layers 20 (gemv.cu)
  gemv_mma,  // mma.sync, up to eight tokens in one pass (gemv_mma.cu)
  skinny,    // mma.sync, up to 16 tokens per pass (skinny.cuh)
  cublas,
};

struct DenseCall {
  int64_t m, n, k;
  bool programmatic;  // the calling thread's launches are programmatic: the engine's
  bool batch_invariant;
};

// Alone, three tokens and more, layers of such a size: cuBLAS is at 4.1 TB/s, ours 1 to 2 % slower.
constexpr bool cublas_is_ahead(const DenseCall& c) {
  const int64_t weights = c.n * c.k;
  return !c.programmatic && c.m >= 3 && weights >= 100'000'000 && weights <= 256'000'000;
}

// What is wanted where gemv_mma cannot take a call: x of so many columns does not fit, or begins
// anywhere.
constexpr DenseKernel choose_dense_without_mma(const DenseCall& c) {
  const int64_t weights = c.n * c.k;
  if (c.m <= 4) return cublas_is_ahead(c) ? DenseKernel::cublas : DenseKernel::gemv;
  return c.programmatic && c.m <= 8 && weights <= 30'000'000 ? DenseKernel::skinny
                                                             : DenseKernel::cublas;
}

// What is wanted; torch's product serves the calls whose dtype, strides or K a kernel cannot take.
// Measured on an H100 and an H200 (docs/kernels/linear.md). Under programmatic launch a kernel of
// ours starts while the one in front still runs, which cuBLAS does not. Alone cuBLAS is ahead from
// five tokens on for small layers. Tiny layers are ours for accuracy: for 40 x 96 in bf16, with a
// strided output, cuBLAS was off by 2.22e-3, where rounding the output costs 1.4e-3.
constexpr DenseKernel choose_dense_kernel(const DenseCall& c) {
  if (c.batch_invariant) return DenseKernel::skinny;
  const int64_t weights = c.n * c.k;
  if (c.m <= 20 && weights <= 1 << 18) return DenseKernel::gemv;
  if (cublas_is_ahead(c)) return DenseKernel::cublas;
  const bool large = weights >= 100'000'000;
  const bool mma = c.m <= 1   ? false
                   : c.m == 2 ? large && c.programmatic
                   : c.m <= 4 ? large || (c.programmatic && c.k <= 8192)
                              : c.m <= 8 && (c.programmatic || weights > 30'000'000);
  return mma ? DenseKernel::gemv_mma : choose_dense_without_mma(c);
}
static_assert(choose_dense_kernel({1, 28672, 4096, false, false}) == DenseKernel::gemv);
static_assert(choose_dense_kernel({2, 4096, 14336, false, false}) == DenseKernel::gemv);
static_assert(choose_dense_kernel({4, 4096, 4096, false, false}) == DenseKernel::gemv);
static_assert(choose_dense_kernel({4, 4096, 4096, true, false}) == DenseKernel::gemv_mma);
static_assert(choose_dense_kernel({4, 28672, 4096, false, false}) == DenseKernel::cublas);
static_assert(choose_dense_kernel({4, 57344, 8192, false, false}) == DenseKernel::gemv_mma);
static_assert(choose_dense_without_mma({4, 28672, 4096, false, false}) == DenseKernel::cublas);
static_assert(choose_dense_kernel({4, 4096, 14336, true, false}) == DenseKernel::gemv);
static_assert(choose_dense_kernel({5, 28672, 4096, true, false}) == DenseKernel::gemv_mma);
static_assert(choose_dense_kernel({17, 1024, 192, true, false}) == DenseKernel::gemv);
static_assert(choose_dense_kernel({20, 1024, 192, false, false}) == DenseKernel::gemv);
static_assert(choose_dense_kernel({21, 1024, 192, true, false}) == DenseKernel::cublas);
static_assert(choose_dense_kernel({13, 40, 96, false, false}) == DenseKernel::gemv);
static_assert(choose_dense_kernel({512, 57344, 8192, false, true}) == DenseKernel::skinny);
static_assert(choose_dense_kernel({1, 64, 64, true, true}) == DenseKernel::skinny);
static_assert(choose_dense_kernel({8, 4096, 4096, true, false}) == DenseKernel::gemv_mma);
static_assert(choose_dense_without_mma({8, 4096, 4096, true, false}) == DenseKernel::skinny);
static_assert(choose_dense_without_mma({8, 28672, 4096, true, false}) == DenseKernel::cublas);
static_assert(choose_dense_kernel({8, 4096, 4096, false, false}) == DenseKernel::cublas);
static_assert(choose_dense_kernel({8, 28672, 4096, false, false}) == DenseKernel::cublas);
static_assert(choose_dense_kernel({8, 10240, 8192, false, false}) == DenseKernel::gemv_mma);
static_assert(choose_dense_kernel({9, 28672, 4096, true, false}) == DenseKernel::cublas);

}  // namespace fastinfer
