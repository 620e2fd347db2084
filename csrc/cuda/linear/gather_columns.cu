// gather_columns: the rows of X in the order of the packed columns (act-order), or copied as they
// are to where TMA can read them. One block per row, 16-bit elements.
#include "../common/launch.cuh"
#include "wide.h"

namespace fastinfer::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    gather_kernel(const uint16_t* x, int64_t x_stride, int64_t k, const int32_t* perm, uint16_t* to,
                  int64_t to_stride) {
  grid_wait();
  grid_launch_dependents();
  const uint16_t* const from = x + blockIdx.x * x_stride;
  uint16_t* const row = to + blockIdx.x * to_stride;
  for (int64_t c = threadIdx.x; c < k; c += kThreads) row[c] = from[perm ? perm[c] : c];
}

}  // namespace

int gather_columns(const void* x, int64_t x_stride, int64_t m, int64_t k, const int32_t* perm,
                   void* to, int64_t to_stride, void* stream) {
  if (m > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(gather_kernel, dim3(static_cast<unsigned>(m)), dim3(kThreads), 0, stream,
                static_cast<const uint16_t*>(x), x_stride, k, perm, static_cast<uint16_t*>(to),
                to_stride);
}

}  // namespace fastinfer::cuda
