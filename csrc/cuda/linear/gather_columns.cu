// gather_columns: the rows of X in the order of the packed columns (act-order), or copied as they
// are to where TMA can read them. 16-bit elements; a thread makes 8 neighbouring columns of a row,
// whose sources lie anywhere in it: a row fits the first-level cache.
#include "../common/launch.cuh"
#include "wide.h"

namespace fastinfer::cuda {
namespace {

constexpr int kThreads = 256;

// to_stride is a multiple of 8: a row ends in a whole pack, what lies past k in it is never read.
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const uint16_t* x, int64_t x_stride, int64_t k, const int32_t* perm, uint16_t* to,
                  int64_t to_stride) {
  const uint16_t* const from = x + blockIdx.x * x_stride;
  uint16_t* const row = to + blockIdx.x * to_stride;
  const int64_t first = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * 8;
  int64_t source[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t c = first + i < k ? first + i : 0;
    source[i] = perm ? perm[c] : c;
  }
  grid_wait();
  grid_launch_dependents();
  if (first >= k) return;
  uint32_t w[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) w[i] = from[source[i]];
  *reinterpret_cast<uint4*>(row + first) =
      make_uint4(w[0] | w[1] << 16, w[2] | w[3] << 16, w[4] | w[5] << 16, w[6] | w[7] << 16);
}

}  // namespace

int gather_columns(const void* x, int64_t x_stride, int64_t m, int64_t k, const int32_t* perm,
                   void* to, int64_t to_stride, void* stream) {
  if (m > INT32_MAX) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(m),
                  static_cast<unsigned>(ceil_div(ceil_div(k, 8), kThreads)));
  return launch(gather_kernel, grid, dim3(kThreads), 0, stream, static_cast<const uint16_t*>(x),
                x_stride, k, perm, static_cast<uint16_t*>(to), to_stride);
}

}  // namespace fastinfer::cuda
