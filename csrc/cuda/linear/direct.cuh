// Y[M, N] = X[M, K] W[N, K]^T + bias, 4-bit W, few tokens: codes go from memory straight to the
// registers that are fragments of W (skinny.cuh has the arithmetic and why W is operand A).
//
// A team of `ranks` CTAs (a cluster; mostly one CTA) owns a run of strips of 16 rows, a rank a part
// of K. x of that part lies in shared memory. The warps of a CTA form 1 << row_shift groups, each
// with its strips of a round, and cut the columns among them; a warp's columns are the same for
// every strip. It holds kPairs pairs of 64-column blocks, all of them asked for in advance, across
// strips: no barrier and no shared memory between a load and its products. Sums of the warps meet in
// shared memory, a barrier per round; ranks exchange theirs once, after the last strip.
//
// Weights are read before grid_wait(): they are older than the launch (launch.cuh). Under
// programmatic launch the second-level cache is asked for the next `ahead` pairs of each warp as
// well. With at most 64 registers two kernels of a chain share a multiprocessor.
#pragma once

#include "../ptx/cluster.cuh"
#include "direct_choice.h"
#include "skinny_product.cuh"

namespace fastinfer::cuda {

__device__ __forceinline__ uint4 load_stream(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}
__device__ __forceinline__ void prefetch_l2(const void* from, uint32_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
#endif
}

// A pair of 64-column blocks of kStrips strips, as a lane holds it.
template <int kStrips>
struct DirectSlot {
  uint4 w[kStrips][2];
  uint2 scale[kStrips];  // rows g8, g8 + 8: two 16-bit values, or two floats
  uint32_t zero[kStrips];
};

// What a warp reads: pairs [first, first + count) of strip `strip`, then of the strip of the next
// round.
template <int kStrips, bool kWide>
struct DirectStream {
  const SkinnyParams& p;
  const int first, count, end, lane, group;
  const char* w;
  uint32_t entry;  // of scales and zeros, in group 0
  int strip, inside, left, step;

  __device__ __forceinline__ DirectStream(const SkinnyParams& params, int first_, int count_,
                                          int begin, int end_, int group_, int lane_)
      : p(params), first(first_), count(count_), end(count_ > 0 ? end_ : begin), lane(lane_),
        group(group_) {
    strip = begin, inside = begin % 4;
    w = static_cast<const char*>(p.w) +
        (static_cast<int64_t>(begin / 4) * p.steps + 2 * first) * 2048 + inside * 512 + lane * 16;
    entry = begin / 4 * 64 + lane / 4 * 8 + 2 * inside;
    left = count, step = 2 * first;
  }
  // From a strip to the second one of the tile; of one that is not there the first is read again.
  __device__ __forceinline__ int delta() const {
    return strip + 1 >= end ? 0 : inside == 3 ? p.steps * 2048 - 3 * 512 : 512;
  }
  __device__ __forceinline__ void next() {
    w += 4096, step += 2;
    if (--left == 0) {
      left = count, step = 2 * first;
      strip += group, inside += group;
      w += group * 512 - count * 4096;
      entry += 2 * group;
#pragma unroll 1
      while (inside >= 4) {
        inside -= 4;
        w += (p.steps - 1) * 2048;
        entry += 64 - 8;
      }
    }
  }
  // `nothing` is 0 but comes out of data that have to be here first.
  __device__ __forceinline__ void load(DirectSlot<kStrips>& to, int nothing) {
    if (strip >= end + nothing) return;
    const int second = step + 1 < p.steps ? 2048 : 0;
    const uint32_t e = entry + group_of(step, p.group_magic) * (p.tiles * 64);
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      const int d = s ? delta() : 0;
      to.w[s][0] = load_stream(w + d);
      to.w[s][1] = load_stream(w + (d + second));
      const uint32_t at = e + (s == 0 || d == 0 ? 0 : d == 512 ? 2 : 64 - 6);
      const char* const scale = static_cast<const char*>(p.scales) + uint64_t{at} * (kWide ? 4 : 2);
      if constexpr (kWide) {
        asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];"
                     : "=r"(to.scale[s].x), "=r"(to.scale[s].y)
                     : "l"(scale));
      } else {
        asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(to.scale[s].x) : "l"(scale));
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
  __device__ __forceinline__ void prefetch() {
    if (strip >= end) return;
    const int block = lane % 2;
    if (lane < 2 * kStrips && step + block < p.steps)
      prefetch_l2(w + (block * 2048 - 16 * lane) + (lane >= 2 ? delta() : 0), 512);
    next();
  }
};

template <bool kBf16, bool kWide, int kTiles, int kStrips, int kWarps, int kPairs, int kCtas>
__global__ void __launch_bounds__(32 * kWarps, kCtas)
    direct_kernel(const __grid_constant__ SkinnyParams p, const int ahead) {
  using E = std::conditional_t<kBf16, __nv_bfloat16, __half>;
  constexpr int kThreads = 32 * kWarps, kPitch = 20;
  extern __shared__ __align__(128) unsigned char shared[];
  grid_launch_dependents();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int team = blockIdx.x >> p.rank_shift, rank = blockIdx.x & (p.ranks - 1);
  const int strips = (p.n + 15) / 16, pairs = (p.steps + 1) / 2;
  const int begin = static_cast<int>(static_cast<int64_t>(strips) * team / p.teams),
            end = static_cast<int>(static_cast<int64_t>(strips) * (team + 1) / p.teams);
  // Of the rank; of the warp.
  const int slice = pairs * rank / p.ranks, slice_pairs = pairs * (rank + 1) / p.ranks - slice;
  const int row_parts = 1 << p.row_shift, column_parts = kWarps >> p.row_shift;
  const int row_part = warp & (row_parts - 1), column_part = warp >> p.row_shift;
  const int skipped = slice_pairs * column_part / column_parts,
            count = slice_pairs * (column_part + 1) / column_parts - skipped;
  const int group = kStrips << p.row_shift;  // strips of a round
  const DirectShared at = direct_shared(p.m, p.x_pitch, kWarps, p.row_shift, kStrips, 0);
  float* const partial = reinterpret_cast<float*>(shared + at.partial);
  float* const sums = reinterpret_cast<float*>(shared + at.sums);
  const auto stage = [&] {
    grid_wait();
    stage_x<kThreads>(p, reinterpret_cast<E*>(shared), slice * 128, slice_pairs * 128);
    cp_async_commit();
  };
  if (!p.weights_first) stage();
  DirectStream<kStrips, kWide> stream(p, slice + skipped, count, begin + row_part * kStrips, end,
                                      group, lane);
  DirectSlot<kStrips> slot[2][kPairs];
#pragma unroll
  for (int b = 0; b < 2; ++b)
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        slot[b][i].w[s][0] = slot[b][i].w[s][1] = make_uint4(0, 0, 0, 0);
        slot[b][i].scale[s] = make_uint2(0, 0);
        slot[b][i].zero[s] = 0x0808;
      }
      stream.load(slot[b][i], 0);
    }
  if (p.weights_first) {
    if (ahead > 0) {
      DirectStream<kStrips, kWide> more(stream);
#pragma unroll 1
      for (int i = 0; i < ahead; ++i) more.prefetch();
    }
    stage();
  }
  cp_async_wait<0>();
  __syncthreads();

  // Rows of x for ldmatrix. Absent tokens read the first one: a column of B meets its own column of
  // the result only.
  uint32_t x_base[kTiles], x[kTiles];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int token = 8 * i + lane % 8;
    x_base[i] = shared_address(shared) + lane / 8 * 16 + skipped * 256 +
                (token < p.m ? token * p.x_pitch * 2 : 0);
    keep(x_base[i]);
    x[i] = x_base[i];
  }
  const bool half_scale = p.scale_dtype == DType::f16;
  Int4Zero<kBf16> zero[kStrips];
#pragma unroll
  for (int s = 0; s < kStrips; ++s) zero[s].set(0, 8), zero[s].set(1, 8);
  float total[kStrips][kTiles][4] = {};

  const auto multiply = [&](const DirectSlot<kStrips>& from) {
    float acc[kStrips][kTiles][4] = {};
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
        uint32_t b[kTiles][4];
#pragma unroll
        for (int i = 0; i < kTiles; ++i) ldmatrix_x4(b[i], x[i] + block * 128 + h * 64);
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int s = 0; s < kStrips; ++s) {
            const uint4& w = from.w[s][block];
            const uint32_t words[4] = {w.x, w.y, w.z, w.w};
            uint32_t a[4];
            dequantize_int4<kBf16>(a, words[2 * h + j], zero[s]);
#pragma unroll
            for (int i = 0; i < kTiles; ++i)
              mma_16816<kBf16>(acc[s][i], a, b[i][2 * j], b[i][2 * j + 1]);
          }
      }
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      const uint2 raw = from.scale[s];
      float2 f = make_float2(__uint_as_float(raw.x), __uint_as_float(raw.y));
      if constexpr (!kWide) {
        const float2 h = __half22float2(*reinterpret_cast<const __half2*>(&raw.x));
        f.x = half_scale ? h.x : __uint_as_float(raw.x << 16);
        f.y = half_scale ? h.y : __uint_as_float(raw.x & 0xFFFF0000u);
      }
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          total[s][i][e] = fmaf(acc[s][i][e], e < 2 ? f.x : f.y, total[s][i][e]);
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) x[i] += 256;
  };

  const auto store = [&](int token, int row, float v) {
    if (row >= p.n) return;
    if (p.bias) v = __fadd_rn(v, to_float(static_cast<const E*>(p.bias)[row]));
    static_cast<E*>(p.out)[token * p.out_stride + row] = from_float<E>(v);
  };
  // The end of a round. Of single strips two are added up at a time, by warps that change.
  const int batch = max(group, 2), buffers = 2 * batch, warp_floats = p.m * kPitch;
  const auto finish = [&](int round) {
    const int done = round * group, g8 = lane / 4, t = lane % 4;
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      const int buffer = (done + row_part * kStrips + s) & (buffers - 1);
      float* const mine = partial + (buffer * column_parts + column_part) * warp_floats;
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int token = 8 * i + 2 * t + e % 2;
          if (token < p.m) mine[token * kPitch + g8 + e / 2 * 8] = total[s][i][e];
          total[s][i][e] = 0.0f;
        }
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) x[i] = x_base[i];
    const int last = min(done + group, end - begin);
    if (group == 1 && last % 2 == 1 && begin + last < end) return;
    __syncthreads();
    const int start = (last - 1) & ~(batch - 1), outputs = p.m * 16;
    for (int e = (threadIdx.x + start * 80) & (kThreads - 1); e < (last - start) * outputs;
         e += kThreads) {
      int which = start, token = e >> 4;
      while (token >= p.m) token -= p.m, ++which;
      const float* from = partial + (which & (buffers - 1)) * column_parts * warp_floats +
                          token * kPitch + e % 16;
      float v = from[0];
#pragma unroll 8
      for (int c = 1; c < column_parts; ++c) v += from[c * warp_floats];
      if (p.ranks > 1)
        sums[(which * p.m + token) * 16 + e % 16] = v;
      else
        store(token, (begin + which) * 16 + e % 16, v);
    }
  };

  const int rounds = (end - begin + group - 1) / group;
  int round = 0, left = count;
  if (count == 0)
    for (; round < rounds; ++round) finish(round);
  bool first = true;
#pragma unroll 1
  while (round < rounds) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      // The compiler counts all loads with one scoreboard, so that waiting for some means waiting
      // for all: the other half is asked for when this one has come, and comes while it is used.
      const int nothing = static_cast<int>(slot[b][0].w[0][0].x & p.nothing);
      if (!first || b > 0)
#pragma unroll
        for (int i = 0; i < kPairs; ++i) stream.load(slot[1 - b][i], nothing);
      first = false;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        if (round < rounds) {
          multiply(slot[b][i]);
          if (--left == 0) {
            finish(round++);
            left = count;
          }
        }
      }
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
