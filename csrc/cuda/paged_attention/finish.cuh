// The end of a piece: the warps' states are merged through the stage that was read last (no copy
// goes to it until then), and leave as output, or as a partial result in the workspace. The CTA
// that finishes the last piece of an item merges all of them in the order of the keys, whatever the
// order of arrival: pieces in groups of kMergeFan first, each group by whoever completes it, where
// there are many.
#pragma once

#include "attend.cuh"

namespace fastinfer::cuda {

// How an item is cut and where its partial results are.
struct Pieces {
  int count, ordinal;  // of this piece
  int base;            // CTA of the first piece; fixed pieces: its index
  int step;            // between the CTAs of neighbouring pieces
  bool fixed;
  int fan;          // pieces of a group; all of them when one merge does
  int32_t* done;    // counter of the item
  int32_t* groups;  // counters of its groups

  // A CTA holds at most one piece that another one began (2s) and one that another goes on with.
  __device__ __forceinline__ int index(int k) const {
    return fixed ? base + k : k == 0 ? 2 * base + 1 : 2 * (base + k * step);
  }
  __device__ __forceinline__ int32_t* group_counter(int group) const {
    if (fixed) return groups + group;
    // Group 0 and the others count in different thirds: a CTA can begin one item and go on with
    // another.
    return groups + (group > 0 ? gridDim.x * gridDim.y : 0) + group * fan * step;
  }
};

__device__ __forceinline__ Pieces cut_item(const DecodeParams& p, const Slot& slot,
                                           const Walk& walk, int tile) {
  Pieces c;
  c.fixed = p.invariant;
  if (c.fixed) {
    const int lowest = first_tile(walk.len, p.q_len, p.window_left) / kInvariantTiles;
    const int tiles = (walk.len + kPlanTile - 1) / kPlanTile;
    const int pairs = p.heads_kv * p.row_blocks;
    const int item = walk.b * pairs + walk.pair(p, slot);
    const int group_counters = (p.max_pieces + kMergeFan - 1) / kMergeFan;
    c.count = max(1, (tiles + kInvariantTiles - 1) / kInvariantTiles - lowest);
    c.ordinal = tile / kInvariantTiles - lowest;
    c.base = item * p.max_pieces;
    c.step = 1;
    c.fan = kMergeFan;
    c.done = p.counters + item;
    c.groups = p.counters + p.batch * pairs + item * group_counters;
  } else {
    c.count = 1;
    if (walk.position >= slot.begin && walk.position + walk.cost <= slot.end) return c;
    const int first = walk.position / slot.share;
    c.count = (walk.position + walk.cost - 1) / slot.share - first + 1;
    c.ordinal = static_cast<int>(blockIdx.y) - first;
    c.base = first * p.lanes + slot.lane;
    c.step = p.lanes;
    c.done = p.counters + c.base;
    c.groups = p.counters + gridDim.x * gridDim.y + c.base;
    // One CTA reads about 64 bytes per clock; a second round of arrivals costs about a microsecond.
    c.fan = c.count;
    if (c.count * min(p.rows, 16 * p.row_tiles) * p.dim > 500 * 128) {
      c.fan = 2;
#pragma unroll 1
      while (c.fan * c.fan < c.count) ++c.fan;
    }
  }
  return c;
}

template <class A>
struct Finish {
  using L = typename A::L;
  static constexpr int kColumns = L::kMergePitch - 4;  // D
  static constexpr int kRowStep = kDecodeThreads * 4 / kColumns;
  const DecodeParams& p;
  const Item& item;
  char* shared;
  char* stage;  // first slice of the stage that is free

  __device__ __forceinline__ float* maxima() const {
    return reinterpret_cast<float*>(shared + L::kMax);
  }
  __device__ __forceinline__ float* sums() const {
    return reinterpret_cast<float*>(shared + L::kSum);
  }
  __device__ __forceinline__ float* tops() const {
    return reinterpret_cast<float*>(shared + L::kTop);
  }
  __device__ __forceinline__ int* flag() const {
    return reinterpret_cast<int*>(shared + L::kInts) + 6;
  }
  __device__ __forceinline__ int block_rows() const { return min(p.rows, 16 * p.row_tiles); }

  // A thread has four columns of every kRowStep-th row of the block; body(row, column) is given
  // every kRows-th of those.
  template <int kRows = 1, class Body>
  __device__ __forceinline__ void for_units(Body&& body) const {
    const int column = threadIdx.x % (kColumns / 4) * 4;
    if (column >= p.dim) return;
#pragma unroll 1
    for (int row = threadIdx.x / (kColumns / 4); row < item.rows; row += kRows * kRowStep)
      body(row, column);
  }

  // Four columns of a row: o / sum, with the sink as one more term of the sum.
  __device__ __forceinline__ void emit(int row, int column, float4 o, float top, float sum) const {
    emit_row(p, item.b, item.head, item.row_block * p.row_tiles * 16 + row, column, o, top, sum);
  }
  static __device__ __forceinline__ void emit_row(const DecodeParams& p, int b, int head_kv, int r,
                                                  int column, float4 o, float top, float sum) {
    const int token = p.q_len == 1 ? 0 : r / p.group;
    const int head = head_kv * p.group + r - token * p.group;
    float weight = 1.0f;
    if (p.v_scale && !p.scale_per_token_v) weight = __ldg(p.v_scale + head_kv * p.vs_head);
    if (p.sinks && sum != 0.0f) {
      const int64_t at = head * p.sinks_stride;
      float sink = p.sinks_dtype == DType::f32 ? static_cast<const float*>(p.sinks)[at]
                   : p.sinks_dtype == DType::f16
                       ? __half2float(static_cast<const __half*>(p.sinks)[at])
                       : __bfloat162float(static_cast<const __nv_bfloat16*>(p.sinks)[at]);
      sink *= kLog2e;
      const float higher = fmaxf(sink, top), shrink = exp2f(top - higher);
      sum = sum * shrink + exp2f(sink - higher);
      weight *= shrink;
      top = higher;
    }
    const float inverse = sum == 0.0f ? 0.0f : weight / sum;
    const float x[4] = {o.x * inverse, o.y * inverse, o.z * inverse, o.w * inverse};
    const int64_t at = b * p.out_batch + token * p.out_token + head * p.out_head + column;
    uint16_t* out = static_cast<uint16_t*>(p.out) + at;
    uint2 packed;
    if (p.q_dtype == DType::bf16)
      packed = make_uint2(pack_half2<true>(x[0], x[1]), pack_half2<true>(x[2], x[3]));
    else
      packed = make_uint2(pack_half2<false>(x[0], x[1]), pack_half2<false>(x[2], x[3]));
    if (p.out_packs) {
      *reinterpret_cast<uint2*>(out) = packed;
    } else {
      out[0] = static_cast<uint16_t>(packed.x);
      out[1] = static_cast<uint16_t>(packed.x >> 16);
      out[2] = static_cast<uint16_t>(packed.y);
      out[3] = static_cast<uint16_t>(packed.y >> 16);
    }
    if (p.lse && column == 0)
      p.lse[b * p.lse_batch + token * p.lse_token + head * p.lse_head] =
          sum == 0.0f ? kMinusInf : top * kLn2 + logf(sum);
  }

  __device__ __forceinline__ float* partial(int index) const {
    return p.partial + static_cast<int64_t>(index) * block_rows() * p.dim;
  }
  __device__ __forceinline__ float* partial_ml(int index) const {
    return p.partial_ml + static_cast<int64_t>(index) * block_rows() * 2;
  }

  // Everything this CTA wrote is visible to whoever gets `true`: the last of `expected` arrivals.
  __device__ __forceinline__ bool arrive(int32_t* counter, int expected) const {
    __syncthreads();
    if (threadIdx.x == 0) {
      int before;
      asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;"
                   : "=r"(before)
                   : "l"(counter)
                   : "memory");
      const bool last = before == expected - 1;
      if (last) *counter = 0;
      *flag() = last;
    }
    __syncthreads();
    return *flag() != 0;
  }

  // `count` partial results, `step` apart from piece `begin` on, into one: the output, or the place
  // of the first. Each thread reads all it needs, maxima and sums of its rows included: kRows rows
  // of kRound pieces at once, because nothing else hides the latency. Otherwise the loops stay
  // rolled: this runs once, and instructions have to be fetched too.
  template <int kRows, int kRound>
  __device__ __forceinline__ void merge(const Pieces& c, int begin, int count, int step,
                                        bool last) const {
    const int first = c.index(begin);
    // What lies between neighbours; piece 0 of an unfixed item is out of line.
    const int between = (c.fixed ? 1 : 2 * c.step) * step;
    const int start = begin == 0 && !c.fixed ? 2 * c.base : first;
    const int64_t apart = static_cast<int64_t>(between) * block_rows() * p.dim;
    const int64_t ml_apart = static_cast<int64_t>(between) * block_rows() * 2;
    for_units<kRows>([&](int first_row, int column) {
      float top[kRows], sum[kRows];
      float4 o[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        top[r] = kMinusInf, sum[r] = 0.0f, o[r] = make_float4(0, 0, 0, 0);
      const int at = first_row * p.dim + column;
      const float* x_at = partial(start) + at;
      const float* ml_at = partial_ml(start) + 2 * first_row;
#pragma unroll 1
      for (int left = count; left > 0; left -= kRound) {
        float4 x[kRound][kRows];
        float2 ml[kRound][kRows];
#pragma unroll
        for (int j = 0; j < kRound; ++j) {
          const bool other = j == 0 && left == count;
          const float* x_from = other ? partial(first) + at : x_at;
          const float* ml_from = other ? partial_ml(first) + 2 * first_row : ml_at;
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            ml[j][r] = make_float2(kMinusInf, 0.0f);
            x[j][r] = make_float4(0, 0, 0, 0);
            if (j < left && (r == 0 || first_row + r * kRowStep < item.rows)) {
              ml[j][r] = __ldcg(reinterpret_cast<const float2*>(ml_from + 2 * r * kRowStep));
              x[j][r] = __ldcg(reinterpret_cast<const float4*>(x_from + r * kRowStep * p.dim));
            }
          }
          x_at += apart;
          ml_at += ml_apart;
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          float m = top[r];
#pragma unroll
          for (int j = 0; j < kRound; ++j) m = fmaxf(m, ml[j][r].x);
          const float origin = finite_origin(m), keep = exp2_approx(top[r] - origin);
          sum[r] *= keep, o[r].x *= keep, o[r].y *= keep, o[r].z *= keep, o[r].w *= keep;
          top[r] = m;
#pragma unroll
          for (int j = 0; j < kRound; ++j) {
            const float weight = exp2_approx(ml[j][r].x - origin);
            sum[r] += weight * ml[j][r].y;
            o[r].x += weight * x[j][r].x;
            o[r].y += weight * x[j][r].y;
            o[r].z += weight * x[j][r].z;
            o[r].w += weight * x[j][r].w;
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int row = first_row + r * kRowStep;
        if (r > 0 && row >= item.rows) break;
        if (last) {
          emit(row, column, o[r], top[r], sum[r]);
        } else {
          // The maxima and sums of the first result are still being read: they go elsewhere for
          // now.
          *reinterpret_cast<float4*>(partial(first) + row * p.dim + column) = o[r];
          if (column == 0) tops()[row] = top[r], sums()[row] = sum[r];
        }
      }
    });
    if (last) return;
    __syncthreads();
    if (threadIdx.x < item.rows)
      *reinterpret_cast<float2*>(partial_ml(first) + 2 * threadIdx.x) =
          make_float2(tops()[threadIdx.x], sums()[threadIdx.x]);
  }

  __device__ __forceinline__ void combine(const Pieces& c) const {
    const int group = c.ordinal / c.fan, groups = (c.count + c.fan - 1) / c.fan;
#pragma unroll 1
    for (bool last = groups == 1;; last = true) {
      int begin = 0, count = groups, step = c.fan;
      if (!last || groups == 1)
        begin = group * c.fan, count = min(c.fan, c.count - begin), step = 1;
      if (!arrive(last ? c.done : c.group_counter(group), count)) return;
      // The order of the sums must not depend on the number of rows: rounds of eight in both.
      if (item.rows <= kRowStep)
        merge<1, 8>(c, begin, count, step, last);
      else
        merge<2, 8>(c, begin, count, step, last);
      if (last) return;
    }
  }

  __device__ __forceinline__ void run(A& a, const Pieces& c) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
    const int tile = warp & (p.row_tiles - 1);
    float* top = maxima();
    float* sum = sums();
    a.close();
    if (lane % 4 == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) top[warp * 16 + g + 8 * i] = a.m[i];
    }
    __syncthreads();
    // The max of a row over the teams; outputs and sums relative to it.
    float* own = reinterpret_cast<float*>(stage + warp * L::kSlice);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = g + 8 * i;
      if (tile * 16 + row >= item.rows) continue;
      float m = kMinusInf;
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w)
        if ((w & (p.row_tiles - 1)) == tile) m = fmaxf(m, top[w * 16 + row]);
      const float origin = finite_origin(m);
      a.store(own, i, exp2_approx(a.reference(p, i) - origin));
      if (lane % 4 == 0) {
        sum[warp * 16 + row] = a.l[i] * exp2_approx(a.m[i] - origin);
        if (warp < p.row_tiles) tops()[tile * 16 + row] = m;  // the same in every team
      }
    }
    __syncthreads();
    for_units([&](int row, int column) {
      const float m = tops()[row];
      float4 o = make_float4(0, 0, 0, 0);
      float s = 0.0f;
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) {
        if ((w & (p.row_tiles - 1)) != row / 16) continue;
        s += sum[w * 16 + row % 16];
        const float4 x = *reinterpret_cast<const float4*>(stage + w * L::kSlice +
                                                          (row % 16 * L::kMergePitch + column) * 4);
        o.x += x.x, o.y += x.y, o.z += x.z, o.w += x.w;
      }
      if (c.count == 1) {
        emit(row, column, o, m, s);
        return;
      }
      const int index = c.index(c.ordinal);
      *reinterpret_cast<float4*>(partial(index) + row * p.dim + column) = o;
      if (column == 0) *reinterpret_cast<float2*>(partial_ml(index) + 2 * row) = make_float2(m, s);
    });
    if (c.count > 1) combine(c);
    __syncthreads();  // the stage, the maxima and the flag may be written again
  }
};

}  // namespace fastinfer::cuda
