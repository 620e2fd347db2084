// Y[M, N] = X[M, K] W[N, K]^T + bias, 4-bit W, up to 8 tokens: codes go from memory straight to the
// registers that are fragments of W (skinny.cuh has the arithmetic and why W is operand A).
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

#include "../ptx/cluster.cuh"
#include "direct_choice.h"
#include "skinny_product.cuh"

namespace fastinfer::cuda {

__device__ __forceinline__ uint4 load_codes(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// A pair of 64-column blocks of kStrips strips, as a lane holds it.
template <int kStrips>
struct DirectSlot {
  uint4 w[kStrips][2];
  uint2 scale[kStrips];  // rows g8, g8 + 8: two 16-bit values, or two floats
  uint32_t zero[kStrips];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      w[s][0] = w[s][1] = make_uint4(0, 0, 0, 0);
      scale[s] = make_uint2(0, 0);
      zero[s] = 0x0808;
    }
  }
  // 0, once the codes are here and `after` is known.
  __device__ __forceinline__ int here(const SkinnyParams& p, float after) const {
    int r;
    asm("lop3.b32 %0, %1, %2, %3, 0x80;"
        : "=r"(r)
        : "r"(w[0][0].x), "r"(p.nothing), "r"(__float_as_uint(after)));
    return r;
  }
};

// What a warp reads: pairs [first, first + count) of strip `strip`, then of the strip of the next
// round.
template <int kStrips>
struct DirectStream {
  static constexpr int kBlock = 2048, kStrip = kBlock / 4;  // bytes
  const SkinnyParams& p;
  const int first, count, end, lane, group;
  const char* w;
  uint32_t entry;  // of scales and zeros, in group 0
  int strip, inside, left, step;

  __device__ __forceinline__ DirectStream(const SkinnyParams& params, int first_, int count_,
                                          int begin, int end_, int group_, int lane_)
      : p(params),
        first(first_),
        count(count_),
        end(count_ > 0 ? end_ : begin),
        lane(lane_),
        group(group_) {
    strip = begin, inside = begin % 4;
    w = static_cast<const char*>(p.w) +
        (static_cast<int64_t>(begin / 4) * p.steps + 2 * first) * kBlock + inside * kStrip +
        lane * 16;
    entry = begin / 4 * 64 + lane / 4 * 8 + 2 * inside;
    left = count, step = 2 * first;
  }
  // From a strip to the second one of the tile; of one that is not there the first is read again.
  __device__ __forceinline__ int delta() const {
    return strip + 1 >= end ? 0 : inside == 3 ? p.steps * kBlock - 3 * kStrip : kStrip;
  }
  __device__ __forceinline__ void next() {
    w += 2 * kBlock, step += 2;
    if (--left == 0) {
      left = count, step = 2 * first;
      strip += group, inside += group;
      w += group * kStrip - count * 2 * kBlock;
      entry += 2 * group;
#pragma unroll 1
      while (inside >= 4) {
        inside -= 4;
        w += (p.steps - 1) * kBlock;
        entry += 64 - 8;
      }
    }
  }
  // `nothing` is 0 but comes out of data that have to be here first.
  __device__ __forceinline__ void load(DirectSlot<kStrips>& to, int nothing) {
    if (strip >= end + nothing) return;
    const int second = step + 1 < p.steps ? kBlock : 0;
    const uint32_t e = entry + group_of(step, p.group_magic) * (p.tiles * 64);
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      const int d = s ? delta() : 0;
      to.w[s][0] = load_codes(w + d);
      to.w[s][1] = load_codes(w + (d + second));
      const uint32_t at = e + (s == 0 || d == 0 ? 0 : d == kStrip ? 2 : 64 - 6);
      const char* const scale = static_cast<const char*>(p.scales);
      if (p.scale_dtype == DType::f32) {
        asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];"
                     : "=r"(to.scale[s].x), "=r"(to.scale[s].y)
                     : "l"(scale + uint64_t{at} * 4));
      } else {
        asm volatile("ld.global.nc.u32 %0, [%1];"
                     : "=r"(to.scale[s].x)
                     : "l"(scale + uint64_t{at} * 2));
      }
      if (p.zeros) {
        uint16_t z;
        asm volatile("ld.global.nc.u16 %0, [%1];"
                     : "=h"(z)
                     : "l"(static_cast<const char*>(p.zeros) + at));
        to.zero[s] = z;
      }
    }
    next();
  }
};

template <bool kBf16, int kStrips>
__global__ void __launch_bounds__(32 * kDirectWarps, 1)
    direct_kernel(const __grid_constant__ SkinnyParams p) {
  using E = std::conditional_t<kBf16, __nv_bfloat16, __half>;
  constexpr int kThreads = 32 * kDirectWarps, kPitch = 20;
  extern __shared__ __align__(128) unsigned char shared[];
  grid_launch_dependents();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int team = blockIdx.x >> p.rank_shift, rank = blockIdx.x & (p.ranks - 1);
  // Strips are dealt evenly: `full` to a team, one more to the first `rest` teams.
  const int begin = team * p.deal.full + min(team, p.deal.rest),
            end = begin + p.deal.full + (team < p.deal.rest);
  // Of the rank; of the warp.
  const int pairs = (p.steps + 1) / 2, slice = pairs * rank >> p.rank_shift,
            slice_pairs = (pairs * (rank + 1) >> p.rank_shift) - slice;
  const int row_parts = 1 << p.row_shift, column_parts = kDirectWarps >> p.row_shift;
  const int row_part = warp & (row_parts - 1), column_part = warp >> p.row_shift;
  const int shift = 4 - p.row_shift, skipped = slice_pairs * column_part >> shift,
            count = (slice_pairs * (column_part + 1) >> shift) - skipped;
  static_assert(kDirectWarps == 16, "shift");
  const int group = kStrips << p.row_shift;  // strips of a round

  DirectStream<kStrips> stream(p, slice + skipped, count, begin + row_part * kStrips, end, group,
                               lane);
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
      if (both && count > 1) stream.load(slot[1], 0);
    } else {
      grid_wait();
      const E* row = static_cast<const E*>(p.x);
      uint32_t to = shared_address(shared);
#pragma unroll 1
      for (int token = 0; token < p.m; ++token, row += p.x_stride, to += p.x_pitch * 2) {
#pragma unroll 1
        for (int c = threadIdx.x * 8; c < slice_pairs * 128; c += kThreads * 8) {
          const int column = slice * 128 + c, left = max(0, min(p.k - column, 8));
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
  const uint32_t x_base = shared_address(shared) + lane / 8 * 16 + skipped * 256 +
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
      // Selected, not branched upon.
      const uint2 raw = from.scale[s];
      const float2 h = __half22float2(*reinterpret_cast<const __half2*>(&raw.x));
      float2 f = make_float2(__uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xFFFF0000u));
      f = p.scale_dtype == DType::f16 ? h : f;
      if (p.scale_dtype == DType::f32)
        f = make_float2(__uint_as_float(raw.x), __uint_as_float(raw.y));
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

  const DirectShared at = direct_shared(p.m, p.x_pitch, p.row_shift, kStrips, 0);
  float* const partial = reinterpret_cast<float*>(shared + at.partial);
  float* const sums = reinterpret_cast<float*>(shared + at.sums);
  // Of single strips two are added up at a time.
  const int batch = max(group, 2), buffers = 2 * batch, warp_floats = p.m * kPitch;
  bool loaded = both;
#pragma unroll 1
  for (int done = 0; begin + done < end; done += group) {
#pragma unroll 1
    for (int pair = 0; pair < count; pair += 2) {
      // The compiler counts all loads with one scoreboard, so that waiting for some means waiting
      // for all: one half is asked for when the other has come, and comes while that is used.
      if (!loaded && pair + 1 < count) stream.load(slot[1], slot[0].here(p, total[0][0]));
      loaded = false;
      multiply(slot[0]);
      stream.load(slot[0], slot[1].here(p, total[0][0]));
      if (pair + 1 < count) multiply(slot[1]);
    }
    const int g8 = lane / 4, t = lane % 4;
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      const int buffer = (done + row_part * kStrips + s) & (buffers - 1);
      float* const mine = partial + (buffer * column_parts + column_part) * warp_floats;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int token = 2 * t + e % 2;
        if (token < p.m) mine[token * kPitch + g8 + e / 2 * 8] = total[s][e];
        total[s][e] = 0.0f;
      }
    }
    x = x_base;
    const int last = min(done + group, end - begin);
    if (group == 1 && last % 2 == 1 && begin + last < end) continue;
    // Of two sets of buffers one is written while the other is read.
    named_barrier(1, kThreads);
    const int start = (last - 1) & ~(batch - 1), outputs = (last - start) * p.m * 16;
    // By warps that change.
    for (int e = (threadIdx.x + start * 80) & (kThreads - 1); e < outputs; e += kThreads) {
      int which = start, token = e >> 4;
      while (token >= p.m) token -= p.m, ++which;
      const float* from =
          partial + (which & (buffers - 1)) * column_parts * warp_floats + token * kPitch + e % 16;
      float v = from[0];
#pragma unroll 4
      for (int c = 1; c < column_parts; ++c) v += from[c * warp_floats];
      if (p.ranks > 1)
        sums[(which * p.m + token) * 16 + e % 16] = v;
      else
        store(token, (begin + which) * 16 + e % 16, v);
    }
  }
  if (p.ranks > 1) {
    cluster_sync_shared();
    const int all = (end - begin) * p.m * 16;
    for (int e = rank * kThreads + threadIdx.x; e < all; e += p.ranks * kThreads) {
      float v[kSkinnyRanks];
#pragma unroll
      for (int r = 0; r < kSkinnyRanks; ++r)
        if (r < p.ranks) v[r] = cluster_load(sums + e, r);
#pragma unroll
      for (int r = 1; r < kSkinnyRanks; ++r)
        if (r < p.ranks) v[0] += v[r];
      const int line = e >> 4, which = line / p.m;
      store(line - which * p.m, (begin + which) * 16 + e % 16, v[0]);
    }
    cluster_sync_shared();  // others may still read this CTA's sums
  }
}

}  // namespace fastinfer::cuda
