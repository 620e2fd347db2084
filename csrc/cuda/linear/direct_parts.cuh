// What the direct kernels (direct.cuh, direct_bytes.cuh) are put together from: who does what,
// weights to registers, sums.
#pragma once

#include "../ptx/cluster.cuh"
#include "direct_choice.h"
#include "skinny_load.cuh"

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
  // Of rows g8 and g8 + 8. Selected, not branched upon.
  __device__ __forceinline__ float2 scales(int s, DType type) const {
    const uint2 raw = scale[s];
    const float2 h = __half22float2(*reinterpret_cast<const __half2*>(&raw.x));
    float2 f = make_float2(__uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xFFFF0000u));
    f = type == DType::f16 ? h : f;
    if (type == DType::f32) f = make_float2(__uint_as_float(raw.x), __uint_as_float(raw.y));
    return f;
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

// What a CTA and a warp have to do.
struct DirectShare {
  int team, rank, begin, end;        // strips of the team, dealt evenly: one more to the first ones
  int slice, pairs;                  // pairs of 64-column blocks of the rank
  int row_part, column_part;         // of the warp
  int column_parts, skipped, count;  // its pairs: [slice + skipped, + count)
  int group;                         // strips of a round

  __device__ __forceinline__ DirectShare(const SkinnyParams& p, int warp, int strips) {
    static_assert(kDirectWarps == 16, "shift");
    team = blockIdx.x >> p.rank_shift, rank = blockIdx.x & (p.ranks - 1);
    begin = team * p.deal.full + min(team, p.deal.rest);
    end = begin + p.deal.full + (team < p.deal.rest);
    const int all = (p.steps + 1) / 2;
    slice = all * rank >> p.rank_shift, pairs = (all * (rank + 1) >> p.rank_shift) - slice;
    column_parts = kDirectWarps >> p.row_shift;
    row_part = warp & ((1 << p.row_shift) - 1), column_part = warp >> p.row_shift;
    const int shift = 4 - p.row_shift;
    skipped = pairs * column_part >> shift;
    count = (pairs * (column_part + 1) >> shift) - skipped;
    group = strips << p.row_shift;
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

  __device__ __forceinline__ DirectStream(const SkinnyParams& params, const DirectShare& share,
                                          int lane_)
      : p(params),
        first(share.slice + share.skipped),
        count(share.count),
        end(share.count > 0 ? share.end : share.begin),
        lane(lane_),
        group(share.group) {
    const int begin = share.begin + share.row_part * kStrips;
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

// Ends of rounds: sums of the warps' columns, [buffer][column part][token][kDirectPitch], meet in
// shared memory, those of the ranks at the end.
struct DirectSums {
  const SkinnyParams& p;
  const DirectShare& share;
  float *const partial, *const sums;

  // Of two sets of buffers one is written while the other is read.
  // Where this warp's sums of strip `strip` (counted in the team) belong.
  __device__ __forceinline__ float* mine(int strip) const {
    const int buffer = strip & (2 * share.group - 1);
    return partial + (buffer * share.column_parts + share.column_part) * p.m * kDirectPitch;
  }
  template <class Store>
  __device__ __forceinline__ void add_up(int done, const Store& store) const {
    constexpr int kThreads = 32 * kDirectWarps;
    const int begin = share.begin, end = share.end, group = share.group;
    const int last = min(done + group, end - begin);
    named_barrier(1, kThreads);
    const int warp_floats = p.m * kDirectPitch;
    const int start = (last - 1) & ~(group - 1), outputs = (last - start) * p.m * 16;
    // By warps that change.
    for (int e = (threadIdx.x + start * 80) & (kThreads - 1); e < outputs; e += kThreads) {
      int which = start, token = e >> 4;
      while (token >= p.m) token -= p.m, ++which;
      const float* from = partial + (which & (2 * group - 1)) * share.column_parts * warp_floats +
                          token * kDirectPitch + e % 16;
      float v = from[0];
#pragma unroll 4
      for (int c = 1; c < share.column_parts; ++c) v += from[c * warp_floats];
      if (p.ranks > 1)
        sums[(which * p.m + token) * 16 + e % 16] = v;
      else
        store(token, (begin + which) * 16 + e % 16, v);
    }
  }
  template <class Store>
  __device__ __forceinline__ void exchange(const Store& store) const {
    if (p.ranks == 1) return;
    constexpr int kThreads = 32 * kDirectWarps;
    cluster_sync_shared();
    const int all = (share.end - share.begin) * p.m * 16;
    for (int e = share.rank * kThreads + threadIdx.x; e < all; e += p.ranks * kThreads) {
      float v[kSkinnyRanks];
#pragma unroll
      for (int r = 0; r < kSkinnyRanks; ++r)
        if (r < p.ranks) v[r] = cluster_load(sums + e, r);
#pragma unroll
      for (int r = 1; r < kSkinnyRanks; ++r)
        if (r < p.ranks) v[0] += v[r];
      const int line = e >> 4, which = line / p.m;
      store(line - which * p.m, (share.begin + which) * 16 + e % 16, v[0]);
    }
    cluster_sync_shared();  // others may still read this CTA's sums
  }
};

}  // namespace fastinfer::cuda
