// w8a8_linear: which path, and the sums of weights that zero points need.
#include "w8a8.h"

#include "../common/launch.cuh"
#include "../common/reduce.cuh"
#include "w8a8_mma.cuh"

namespace fastinfer::cuda {
namespace {

constexpr int kThreads = 256;

struct SumsLaunch {
  const int8_t* weight;
  int64_t stride, rows, k;
  int32_t* sums;
  bool aligned;
};

// A warp per row.
__global__ void __launch_bounds__(kThreads) row_sums_kernel(const __grid_constant__ SumsLaunch a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  grid_wait();
  if (row >= a.rows) return;
  int32_t sum = 0;
  const int count = static_cast<int>(a.k);
  for (int k = threadIdx.x % 32 * 16; k < count; k += 512) {
    const uint4 v = load_16<false>(a.weight + row * a.stride, k, count, a.aligned);
    sum += __dp4a(static_cast<int32_t>(v.x), 0x01010101, 0);
    sum += __dp4a(static_cast<int32_t>(v.y), 0x01010101, 0);
    sum += __dp4a(static_cast<int32_t>(v.z), 0x01010101, 0);
    sum += __dp4a(static_cast<int32_t>(v.w), 0x01010101, 0);
  }
  sum = warp_reduce<Sum>(sum);
  if (threadIdx.x % 32 == 0) a.sums[row] = sum;
}

}  // namespace

int row_sums(const int8_t* weight, int64_t stride, int64_t rows, int64_t k, int32_t* sums,
             void* stream) {
  const SumsLaunch a{weight, stride, rows, k, sums, rows_aligned(weight, rows, stride)};
  return launch(row_sums_kernel, static_cast<unsigned>(ceil_div(rows, kThreads / 32)), kThreads, 0,
                stream, a);
}

int w8a8_linear(const cpu::Int8Params& p, void* stream) {
  const W8a8Choice choice = choose_w8a8(
      p.m, p.n, p.k,
      rows_aligned(p.x, p.m, p.x_stride) && rows_aligned(p.weight, p.n, p.weight_stride),
      device_facts().sms, device_facts().compute_capability == 90 && !force_portable());
  switch (choice.path) {
    case W8a8Path::skinny:
      return w8a8_skinny(p, stream);
#ifdef FASTINFER_HAVE_SM90A
    case W8a8Path::sm90:
      return w8a8_sm90(p, choice, stream);
#endif
    default:
      return w8a8_tiles(p, stream);
  }
}

}  // namespace fastinfer::cuda
