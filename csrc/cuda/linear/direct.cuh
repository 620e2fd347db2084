// Y[M, N] = X[M, K] W[N, K]^T + bias, 4-bit W, up to 8 tokens: codes go from memory straight to the
// registers that are fragments of W (skinny.cuh has the arithmetic and why W is operand A). One or
// two tokens of up to kByteColumns columns: direct_bytes.cuh.
//
// A team of `ranks` CTAs (a cluster; mostly one CTA) owns a run of strips of 16 rows, a rank a part
// of K. x of that part lies in shared memory. The warps of a CTA form 1 << row_shift groups, each
// with its strips of a round, and cut the columns among them; a warp's columns are the same for
// every strip. It holds two pairs of 64-column blocks, one of them under way, across strips: no
// barrier and no shared memory between a load and its products. Sums of the warps meet in shared
// memory, a barrier per round; ranks exchange theirs once, after the last strip.
//
// Weights are read before grid_wait(): they are older than the launch (launch.cuh).
#pragma once

#include "direct_parts.cuh"
#include "skinny_product.cuh"

namespace fastinfer::cuda {

template <bool kBf16, int kStrips>
__global__ void __launch_bounds__(32 * kDirectWarps, 1)
    direct_kernel(const __grid_constant__ SkinnyParams p) {
  using E = std::conditional_t<kBf16, __nv_bfloat16, __half>;
  constexpr int kThreads = 32 * kDirectWarps;
  extern __shared__ __align__(128) unsigned char shared[];
  grid_launch_dependents();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const DirectShare share(p, warp, kStrips);
  DirectStream<kStrips> stream(p, share, lane);
  DirectSlot<kStrips> slot[2];
#pragma unroll
  for (auto& s : slot) s.clear();
  // x in front of the weights, which would keep it waiting; one or two tokens come soon enough, and
  // under programmatic launch weights may be read while the kernel in front still writes x.
  const bool both = p.weights_first;
#pragma unroll 1
  for (int turn = 0; turn < 2; ++turn) {
    if ((turn == 0) == (both || p.m <= 2)) {
      stream.load(slot[0], 0);
      if (both && share.count > 1) stream.load(slot[1], 0);
    } else {
      grid_wait();
      const E* row = static_cast<const E*>(p.x);
      uint32_t to = shared_address(shared);
#pragma unroll 1
      for (int token = 0; token < p.m; ++token, row += p.x_stride, to += p.x_pitch * 2) {
#pragma unroll 1
        for (int c = threadIdx.x * 8; c < share.pairs * 128; c += kThreads * 8) {
          const int column = share.slice * 128 + c, left = max(0, min(p.k - column, 8));
          cp_async_zero(to + c * 2, row + (left > 0 ? column : 0), 2 * left);
        }
      }
      cp_async_commit();
    }
  }
  cp_async_wait<0>();
  __syncthreads();

  // Rows of x for ldmatrix. Absent tokens read the first one: a column of B meets its own column of
  // the result only.
  const uint32_t x_base = shared_address(shared) + lane / 8 * 16 + share.skipped * 256 +
                          (lane % 8 < p.m ? lane % 8 * p.x_pitch * 2 : 0);
  uint32_t x = x_base;
  Int4Zero<kBf16> zero[kStrips];
#pragma unroll
  for (int s = 0; s < kStrips; ++s) zero[s].set(0, 8), zero[s].set(1, 8);
  float total[kStrips][4] = {};

  const auto multiply = [&](const DirectSlot<kStrips>& from) {
    float acc[kStrips][4] = {};
    if (p.zeros) {
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        zero[s].set(0, from.zero[s] & 0xFF);
        zero[s].set(1, from.zero[s] >> 8);
      }
    }
#pragma unroll
    for (int block = 0; block < 2; ++block)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t b[4];
        ldmatrix_x4(b, x + block * 128 + h * 64);
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int s = 0; s < kStrips; ++s) {
            const uint4& w = from.w[s][block];
            const uint32_t words[4] = {w.x, w.y, w.z, w.w};
            uint32_t a[4];
            dequantize_int4<kBf16>(a, words[2 * h + j], zero[s]);
            mma_16816<kBf16>(acc[s], a, b[2 * j], b[2 * j + 1]);
          }
      }
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      const float2 f = from.scales(s, p.scale_dtype);
#pragma unroll
      for (int e = 0; e < 4; ++e) total[s][e] = fmaf(acc[s][e], e < 2 ? f.x : f.y, total[s][e]);
    }
    x += 256;
  };
  const auto store = [&](int token, int row, float v) {
    if (row >= p.n) return;
    if (p.bias) v = __fadd_rn(v, to_float(static_cast<const E*>(p.bias)[row]));
    static_cast<E*>(p.out)[token * p.out_stride + row] = from_float<E>(v);
  };

  const DirectShared at = direct_shared(p.m, p.x_pitch, p.row_shift, 0);
  const DirectSums sums{p, share, reinterpret_cast<float*>(shared + at.partial),
                        reinterpret_cast<float*>(shared + at.sums)};
  bool loaded = both;
#pragma unroll 1
  for (int done = 0; share.begin + done < share.end; done += share.group) {
#pragma unroll 1
    for (int pair = 0; pair < share.count; pair += 2) {
      // The compiler counts all loads with one scoreboard, so that waiting for some means waiting
      // for all: one half is asked for when the other has come, and comes while that is used.
      if (!loaded && pair + 1 < share.count) stream.load(slot[1], slot[0].here(p, total[0][0]));
      loaded = false;
      multiply(slot[0]);
      stream.load(slot[0], slot[1].here(p, total[0][0]));
      if (pair + 1 < share.count) multiply(slot[1]);
    }
    const int g8 = lane / 4, t = lane % 4;
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      float* const mine = sums.mine(done + share.row_part * kStrips + s);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int token = 2 * t + e % 2;
        if (token < p.m) mine[token * kDirectPitch + g8 + e / 2 * 8] = total[s][e];
        total[s][e] = 0.0f;
      }
    }
    x = x_base;
    sums.add_up(done, store);
  }
  sums.exchange(store);
}

}  // namespace fastinfer::cuda
