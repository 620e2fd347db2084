// The end of a piece: the warps' states are merged through the stage that was read last (no copy goes
// to it until then), and leave as output, or as a partial result in the workspace. The CTA that
// finishes the last piece of an item merges all of them in the order of the keys, whatever the order of
// arrival: pieces in groups of kMergeFan first, each group by whoever completes it, where there are
// many.
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
    return groups + (group > 0 ? gridDim.x : 0) + group * fan * step;
  }
};

__device__ __forceinline__ Pieces cut_item(const DecodeParams& p, const Slot& slot, const Walk& walk,
                                           int tile) {
  Pieces c;
  c.fixed = p.invariant;
  if (c.fixed) {
    const int lowest = first_tile(walk.len, p.q_len, p.window_left) / kInvariantTiles;
    const int tiles = (walk.len + kPlanTile - 1) / kPlanTile;
    const int pairs = p.heads_kv * p.row_blocks;
    const int item = walk.b * pairs + walk.pair(p, slot);
    const int group_counters = (p.max_pieces + kMergeFan - 1) / kMergeFan;
    c.count = (tiles + kInvariantTiles - 1) / kInvariantTiles - lowest;
    c.ordinal = tile / kInvariantTiles - lowest;
    c.base = item * p.max_pieces;
    c.step = 1;
    c.fan = kMergeFan;
    c.done = p.counters + item;
    c.groups = p.counters + p.batch * pairs + item * group_counters;
  } else {
    const int first = walk.position / slot.share;
    c.count = (walk.position + walk.cost - 1) / slot.share - first + 1;
    c.ordinal = static_cast<int>(blockIdx.x) / p.lanes - first;
    c.base = first * p.lanes + slot.lane;
    c.step = p.lanes;
    c.done = p.counters + c.base;
    c.groups = p.counters + gridDim.x + c.base;
    // One CTA reads about 64 bytes per clock; a second round of arrivals costs about a microsecond.
    c.fan = c.count;
    if (c.count * min(p.rows, 16 * p.row_tiles) * p.dim > 300 * 128) {
      c.fan = 2;
      while (c.fan * c.fan < c.count) ++c.fan;
    }
  }
  return c;
}

template <class A>
struct Finish {
  using L = typename A::L;
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
  __device__ __forceinline__ int* flag() const {
    return reinterpret_cast<int*>(shared + L::kInts) + 6;
  }
  __device__ __forceinline__ int block_rows() const { return min(p.rows, 16 * p.row_tiles); }

  // Rows (row, 4 columns) of the block are dealt to the threads.
  template <class Body>
  __device__ __forceinline__ void for_units(Body&& body) const {
    const int columns = p.dim / 4;
    for (int u = threadIdx.x; u < item.rows * columns; u += kDecodeThreads) {
      const int row = u / columns;
      body(row, (u - row * columns) * 4);
    }
  }

  // Four columns of a row: o / sum, with the sink as one more term of the sum.
  __device__ __forceinline__ void emit(int row, int column, float4 o, float top, float sum) const {
    const int r = item.row_block * p.row_tiles * 16 + row;
    const int token = r / p.group, head = item.head * p.group + r % p.group;
    float weight = 1.0f;
    if (p.v_scale && !p.scale_per_token_v) weight = __ldg(p.v_scale + item.head * p.vs_head);
    if (p.sinks && sum != 0.0f) {
      const int64_t at = head * p.sinks_stride;
      float sink = p.sinks_dtype == DType::f32   ? static_cast<const float*>(p.sinks)[at]
                   : p.sinks_dtype == DType::f16 ? __half2float(static_cast<const __half*>(p.sinks)[at])
                                                 : __bfloat162float(
                                                       static_cast<const __nv_bfloat16*>(p.sinks)[at]);
      sink *= kLog2e;
      const float higher = fmaxf(sink, top), shrink = exp2f(top - higher);
      sum = sum * shrink + exp2f(sink - higher);
      weight *= shrink;
      top = higher;
    }
    const float inverse = sum == 0.0f ? 0.0f : weight / sum;
    const float x[4] = {o.x * inverse, o.y * inverse, o.z * inverse, o.w * inverse};
    const int64_t at = item.b * p.out_batch + token * p.out_token + head * p.out_head + column;
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
      p.lse[item.b * p.lse_batch + token * p.lse_token + head * p.lse_head] =
          sum == 0.0f ? kMinusInf : top * kLn2 + logf(sum);
  }

  __device__ __forceinline__ void empty() const {
    for_units([&](int row, int column) {
      emit(row, column, make_float4(0, 0, 0, 0), kMinusInf, 0.0f);
    });
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
      __threadfence();
      const bool last = atomicAdd(counter, 1) == expected - 1;
      if (last) {
        *counter = 0;
        __threadfence();
      }
      *flag() = last;
    }
    __syncthreads();
    return *flag() != 0;
  }

  // Partial results `begin`, begin + step, .. below `end` into one: the output, or the place of the
  // first. Each thread reads all it needs, maxima and sums of its row included, in rounds of kRound.
  __device__ __forceinline__ void merge(const Pieces& c, int begin, int end, int step,
                                        bool last) const {
    constexpr int kRound = 16;
    for_units([&](int row, int column) {
      float top = kMinusInf, sum = 0.0f;
      float4 o = make_float4(0, 0, 0, 0);
      for (int k = begin; k < end; k += kRound * step) {
        float4 x[kRound];
        float2 ml[kRound];
#pragma unroll
        for (int j = 0; j < kRound; ++j) {
          const int at = k + j * step;
          ml[j] = make_float2(kMinusInf, 0.0f);
          x[j] = make_float4(0, 0, 0, 0);
          if (at < end) {
            const int index = c.index(at);
            ml[j] = __ldcg(reinterpret_cast<const float2*>(partial_ml(index) + 2 * row));
            x[j] = __ldcg(reinterpret_cast<const float4*>(partial(index) + row * p.dim + column));
          }
        }
        float m = top;
#pragma unroll
        for (int j = 0; j < kRound; ++j) m = fmaxf(m, ml[j].x);
        const float origin = finite_origin(m), keep = exp2_approx(top - origin);
        sum *= keep, o.x *= keep, o.y *= keep, o.z *= keep, o.w *= keep;
        top = m;
#pragma unroll
        for (int j = 0; j < kRound; ++j) {
          const float weight = exp2_approx(ml[j].x - origin);
          sum += weight * ml[j].y;
          o.x += weight * x[j].x;
          o.y += weight * x[j].y;
          o.z += weight * x[j].z;
          o.w += weight * x[j].w;
        }
      }
      if (last) {
        emit(row, column, o, top, sum);
      } else {
        // The maxima and sums of the first result are still being read: they go elsewhere for now.
        *reinterpret_cast<float4*>(partial(c.index(begin)) + row * p.dim + column) = o;
        if (column == 0) maxima()[row] = top, sums()[row] = sum;
      }
    });
    if (last) return;
    __syncthreads();
    if (threadIdx.x < item.rows)
      *reinterpret_cast<float2*>(partial_ml(c.index(begin)) + 2 * threadIdx.x) =
          make_float2(maxima()[threadIdx.x], sums()[threadIdx.x]);
  }

  __device__ __forceinline__ void combine(const Pieces& c) const {
    if (c.count > c.fan) {
      const int group = c.ordinal / c.fan, begin = group * c.fan, end = min(begin + c.fan, c.count);
      if (!arrive(c.group_counter(group), end - begin)) return;
      merge(c, begin, end, 1, false);
      if (!arrive(c.done, (c.count + c.fan - 1) / c.fan)) return;
      merge(c, 0, c.count, c.fan, true);
    } else {
      if (!arrive(c.done, c.count)) return;
      merge(c, 0, c.count, 1, true);
    }
  }

  __device__ __forceinline__ void run(A& a, const Pieces& c) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int team = warp / p.row_tiles, tile = warp - team * p.row_tiles;
    const int teams = kDecodeWarps / p.row_tiles, g = lane / 4;
    float* top = maxima();
    float* sum = sums();
    a.close();
    if (lane % 4 == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        top[warp * 16 + g + 8 * i] = a.m[i];
        sum[warp * 16 + g + 8 * i] = a.l[i];
      }
    }
    __syncthreads();
    // Of a row: its max over the teams, then weight 2^(own max - that).
    auto common = [&](int row_tile, int row) {
      float m = kMinusInf;
      for (int other = 0; other < teams; ++other)
        m = fmaxf(m, top[(other * p.row_tiles + row_tile) * 16 + row]);
      return m;
    };
    float* own = reinterpret_cast<float*>(stage + warp * L::kSlice);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = g + 8 * i;
      if (tile * 16 + row >= item.rows) continue;
      a.store(own, i, exp2_approx(a.reference(p, i) - finite_origin(common(tile, row))));
    }
    __syncthreads();
    for_units([&](int row, int column) {
      const int row_tile = row / 16, in_tile = row % 16;
      const float m = common(row_tile, in_tile), origin = finite_origin(m);
      float4 o = make_float4(0, 0, 0, 0);
      float s = 0.0f;
      for (int other = 0; other < teams; ++other) {
        const int w = other * p.row_tiles + row_tile;
        s += sum[w * 16 + in_tile] * exp2_approx(top[w * 16 + in_tile] - origin);
        const float4 x = *reinterpret_cast<const float4*>(
            stage + w * L::kSlice + (in_tile * L::kMergePitch + column) * 4);
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
