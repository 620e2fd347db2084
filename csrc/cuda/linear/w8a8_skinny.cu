// w8a8_linear for few tokens: the weights stream through once, at memory speed.
//
// Persistent: a CTA of 16 warps per SM walks strips of 16 channels, the rows of mma.m16n8k32;
// tokens are its columns. The warps share a strip's K in chunks of 256 (or 128) columns. Since a
// sum may run over K in any order as long as both operands agree, lane t of a quad takes the 16
// neighbouring bytes 16 t .. 16 t + 15 of every 64 for its four registers: every load is 16 bytes
// and the rows need no shared memory. The next chunk is loaded before the current one is
// multiplied, across strips, so that 64 KiB per SM are always on their way. Sums meet by integer
// atomics in shared memory (exact in any order), double-buffered: one barrier per strip.
#include "../common/launch.cuh"
#include "w8a8.h"
#include "w8a8_finish.cuh"
#include "w8a8_mma.cuh"

namespace fastinfer::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kRows = 16;
constexpr int kPiece = 64;         // columns; a chunk is kPieces of them
constexpr int kPitch = kRows + 4;  // of a token's sums: the lanes of an atomic in other banks

struct Launch {
  cpu::Int8Params p;
  int32_t strips, rounds;     // rounds: chunks of a strip per warp
  bool x_aligned, w_aligned;  // rows at multiples of 16 bytes
};

// The chunk a warp is at: round `round` of strip `strip`.
struct Place {
  int32_t strip, round;
  __device__ __forceinline__ Place next(const Launch& a) const {
    return round + 1 < a.rounds ? Place{strip, round + 1}
                                : Place{strip + static_cast<int32_t>(gridDim.x), 0};
  }
};

template <int kTiles, int kPieces>
__global__ void __launch_bounds__(kThreads, 1) skinny_kernel(const __grid_constant__ Launch a) {
  const cpu::Int8Params& p = a.p;
  __shared__ int32_t sums[2][8 * kTiles * kPitch];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4, t = lane % 4;
  const int k_end = static_cast<int>(p.k), m = static_cast<int>(p.m);
  const auto column = [&](int round) {
    return (round * kWarps + warp) * kPieces * kPiece + 16 * t;
  };
  const auto load_weights = [&](uint4(&w)[2 * kPieces], const Place& at) {
    const int k = column(at.round);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t n = static_cast<int64_t>(at.strip) * kRows + 8 * h + g;
      const int8_t* row = p.weight + n * p.weight_stride;
      const int end = n < p.n ? k_end : 0;
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        w[2 * i + h] = load_16<true>(row, k + i * kPiece, end, a.w_aligned);
    }
  };
  uint4 x[kTiles][kPieces];
  const auto load_tokens = [&](int round) {
    const int k = column(round);
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        x[j][i] = load_16<false>(p.x + static_cast<int64_t>(8 * j + g) * p.x_stride, k + i * kPiece,
                                 8 * j + g < m ? k_end : 0, a.x_aligned);
  };
  int32_t d[kTiles][4] = {};
  int buffer = 0;
  // Thread 16 i + r finishes token i, channel r of a strip. Its vectors are read ahead.
  const int token = static_cast<int>(threadIdx.x) / kRows;
  const bool finishes = token < m;
  float x_scale = 0.0f, scale = 0.0f, bias = 0.0f;
  int32_t zero = 0, weight_sum = 0;
  const auto channel = [&](int32_t strip) {
    return static_cast<int64_t>(strip) * kRows + static_cast<int>(threadIdx.x) % kRows;
  };
  const auto finish_strip = [&](int32_t strip) {
    int32_t* total = sums[buffer];
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = 8 * j + 2 * t + e % 2;
        if (row < m) atomicAdd(total + row * kPitch + g + e / 2 * 8, d[j][e]);
        d[j][e] = 0;
      }
    __syncthreads();
    // The other buffer takes the next strip's sums; this one is used again after its barrier.
    const int64_t n = channel(strip);
    if (finishes) {
      int32_t* const from = total + token * kPitch + static_cast<int>(threadIdx.x) % kRows;
      const float y =
          w8a8_value(*from, zero, weight_sum, x_scale, scale, p.out.bias != nullptr, bias);
      *from = 0;
      if (n < p.n) store_float(p.out.dtype, p.out.data, token * p.out.stride + n, y);
    }
    buffer ^= 1;
  };
  const auto multiply = [&](const uint4(&w)[2 * kPieces], const Place& at) {
    if (a.rounds > 1) load_tokens(at.round);
    if (at.round == 0 && finishes && channel(at.strip) < p.n) {
      scale = p.weight_scale[channel(at.strip)];
      if (p.out.bias) bias = float_at(p.out.dtype, p.out.bias, channel(at.strip));
      if (p.x_zeros) weight_sum = p.weight_sum[channel(at.strip)];
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const uint4 &top = w[2 * i], &bottom = w[2 * i + 1], &b = x[j][i];
        mma_s8(d[j], top.x, bottom.x, top.y, bottom.y, b.x, b.y);
        mma_s8(d[j], top.z, bottom.z, top.w, bottom.w, b.z, b.w);
      }
    if (at.round + 1 == a.rounds) finish_strip(at.strip);
  };

  uint4 w[2][2 * kPieces];
  Place at{static_cast<int32_t>(blockIdx.x), 0};
  load_weights(w[0], at);  // before the wait: no kernel right in front writes weights
  for (int i = threadIdx.x; i < 2 * 8 * kTiles * kPitch; i += kThreads) sums[0][i] = 0;
  grid_wait();
  if (a.rounds == 1) load_tokens(0);
  if (finishes) {
    x_scale = p.x_scale[token];
    if (p.x_zeros) zero = p.x_zeros[token];
  }
  __syncthreads();
  while (at.strip < a.strips) {
    const Place second = at.next(a), third = second.next(a);
    load_weights(w[1], second);
    multiply(w[0], at);
    if (second.strip >= a.strips) break;
    load_weights(w[0], third);
    multiply(w[1], second);
    at = third;
  }
}

}  // namespace

int w8a8_skinny(const cpu::Int8Params& p, void* stream) {
  Launch a{p, static_cast<int32_t>(ceil_div(p.n, kRows)), 0, rows_aligned(p.x, p.m, p.x_stride),
           rows_aligned(p.weight, p.n, p.weight_stride)};
  const int sms = device_facts().sms;
  const auto grid = static_cast<unsigned>(a.strips < sms ? a.strips : sms);
  const int64_t out_size = dtype_size(p.out.dtype);
  for (int64_t m = 0; m < p.m; m += 16) {  // more than 16 tokens only on GPUs without wgmma
    a.p.m = p.m - m < 16 ? p.m - m : 16;
    a.p.x = p.x + m * p.x_stride;
    a.p.x_scale = p.x_scale + m;
    a.p.x_zeros = p.x_zeros ? p.x_zeros + m : nullptr;
    a.p.out.data = static_cast<char*>(p.out.data) + m * p.out.stride * out_size;
    const auto run = [&](auto kernel, int pieces) {
      a.rounds = static_cast<int32_t>(ceil_div(p.k > 0 ? p.k : 1, kWarps * kPiece * pieces));
      return launch(kernel, grid, kThreads, 0, stream, a);
    };
    // Two token tiles leave registers for half a chunk: 11.4 against 13.2 us (4096 x 4096, H100).
    const int error = a.p.m <= 8 ? run(skinny_kernel<1, 4>, 4) : run(skinny_kernel<2, 2>, 2);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace fastinfer::cuda
