// Few rows of 16-bit elements, a block each, a pack of 16 bytes per thread: the kernel of
// norm_rows.cuh with as little code as the common case needs (symmetric codes, one row dimension).
// With a row or two the time of a kernel is mostly that of fetching its instructions.
//
// The tree of norm.cuh: pack p belongs to lane p % 32 of warp p / 32, so the bits are the same.
#pragma once

#include "norm.cuh"

namespace fastinfer::cuda {

struct NormFew {
  const void *x, *weight;
  void *residual, *out;  // out: q where there are codes
  float* scale;
  int64_t x_stride, residual_stride, out_stride;  // elements
  int32_t packs;
  float eps, inverse_dim;
};

template <class E, bool kQuant>
__global__ void __launch_bounds__(kMaxRowThreads)
    norm_few_kernel(const __grid_constant__ NormFew a) {
  static_assert(Pack<E>::kSize == 8, "16-bit elements");
  __shared__ uint2 found[32];  // of each warp: sum, largest magnitude
  const uint32_t thread = threadIdx.x, lane = thread % 32;
  const int64_t r = blockIdx.x;
  const bool holds = thread < static_cast<uint32_t>(a.packs);
  uint4 weight{}, x{}, add{};
  if (holds) weight = static_cast<const uint4*>(a.weight)[thread];
  grid_launch_dependents();
  grid_wait();
  uint4* residual =
      reinterpret_cast<uint4*>(static_cast<E*>(a.residual) + r * a.residual_stride) + thread;
  if (holds) {
    x = (reinterpret_cast<const uint4*>(static_cast<const E*>(a.x) + r * a.x_stride))[thread];
    if (a.residual) add = *residual;
  }
  if (a.residual) {
    x = sum_of<E>(x, add);
    if (holds) *residual = x;
  }
  float y[8], w[8];
  unpack<E>(y, x);
  unpack<E>(w, weight);
  float sum = add_squares(0.0f, y);
  uint32_t top = 0;
  if constexpr (kQuant) {
#pragma unroll
    for (int j = 0; j < 8; ++j) y[j] *= w[j];
    top = __reduce_max_sync(kAllLanes, top_of_eight(y));
  }
  sum = warp_reduce<Sum>(sum);
  if (lane == 0) found[thread / 32] = make_uint2(__float_as_uint(sum), top);
  __syncthreads();
  // Warps that the row does not have count as zeros.
  uint2 other{};
  if (lane < blockDim.x / 32) other = found[lane];
  sum = warp_reduce<Sum>(__uint_as_float(other.x));
  const float inv = rsqrtf(sum * a.inverse_dim + a.eps);
  if constexpr (!kQuant) {
#pragma unroll
    for (int j = 0; j < 8; ++j) y[j] = y[j] * inv * w[j];
    if (holds)
      reinterpret_cast<uint4*>(static_cast<E*>(a.out) + r * a.out_stride)[thread] = pack_of<E>(y);
  } else {
    top = __reduce_max_sync(kAllLanes, other.y);
    uint2 words;
    float scale;
    if (norm_is_near(top, inv)) {
      const QuickCodes codes(top);
      words = codes.words<true>(y);
      scale = codes.scale * inv;
    } else {
      // A sum beyond fp32 makes a row of zeros, unless the row holds inf or NaN.
      const RareCodes codes = rare_codes(inv == 0.0f && top < 0x7F800000u ? 0 : top, inv, y);
      words = codes.words, scale = codes.scale;
    }
    if (holds) reinterpret_cast<uint2*>(static_cast<E*>(a.out))[r * a.packs + thread] = words;
    if (thread == 0) a.scale[r] = scale;
  }
}

template <class E, bool kQuant>
int launch_norm_few(const NormLaunch& a, void* stream) {
  const NormFew few{a.x,     a.weight,      a.residual,           a.out,
                    a.scale, a.x_stride[1], a.residual_stride[1], a.out_stride[1],
                    a.packs, a.eps,         a.inverse_dim};
  return launch(norm_few_kernel<E, kQuant>, a.rows,
                static_cast<unsigned>(ceil_div(a.packs, 32) * 32), 0, stream, few);
}

}  // namespace fastinfer::cuda
