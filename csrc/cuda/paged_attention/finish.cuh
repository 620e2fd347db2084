// The end of a piece: the warps' states are merged through the stage that was read last (no copy
// goes to it until then), and leave as output, or as a partial result in the workspace. The CTA
// that finishes the last piece of an item merges all of them in the order of the keys, whatever the
// order of arrival: pieces in groups of kMergeFan first, each group by whoever completes it, where
// there are many.
#pragma once

#include "../ptx/async_copy.cuh"
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

template <class P>
__device__ __forceinline__ Pieces cut_item(const P& p, const Slot& slot, const Walk& walk,
                                           int tile) {
  Pieces c{};
  c.fan = 1;
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
    const int rows = min(p.rows, 16 * p.row_tiles);
    if (c.count * rows * p.dim > 500 * 128 || c.count * rows > kStaged) {
      c.fan = 2;
#pragma unroll 1
      while (c.fan * c.fan < c.count) ++c.fan;
    }
  }
  return c;
}

template <class A, class P>
struct Finish {
  using L = typename A::L;
  static constexpr int kColumns = A::kColumns;  // D
  static constexpr int kRowStep = kDecodeThreads * 4 / kColumns;
  const P& p;
  const Item& item;
  char* shared;
  char* stage;  // first slice of the stage that is free

  __device__ __forceinline__ float2* states() const {
    return reinterpret_cast<float2*>(shared + L::kStates);
  }
  __device__ __forceinline__ int* flag() const {
    return reinterpret_cast<int*>(shared + L::kInts) + 6;
  }
  __device__ __forceinline__ int block_rows() const { return min(p.rows, 16 * p.row_tiles); }

  // Four columns of a row: o / sum, with the sink as one more term of the sum.
  __device__ __forceinline__ void emit(int row, int column, float4 o, float top, float sum) const {
    emit_row(p, item.b, item.head, item.row_block * p.row_tiles * 16 + row, column, o, top, sum);
  }
  static __device__ __forceinline__ void emit_row(const P& p, int b, int head_kv, int r, int column,
                                                  float4 o, float top, float sum) {
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

  // Weights and outputs of `n` states in shared memory, added to sum and o.
  static __device__ __forceinline__ void add(int n, uint32_t pair, int pair_step, uint32_t x,
                                             int x_step, float origin, float& sum, float4& o) {
#pragma unroll 4
    for (int k = 0; k < n; ++k) {
      const float2 s = A::shared_pair(pair + k * pair_step);
      float4 v;
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                   : "r"(x + k * x_step)
                   : "memory");
      const float weight = exp2_approx(s.x - origin);
      sum += weight * s.y;
      o.x += weight * v.x, o.y += weight * v.y, o.z += weight * v.z, o.w += weight * v.w;
    }
  }

  // A thread has four columns of every kRowStep-th row. The same code adds up the warps' states and
  // then the pieces, which come into shared memory first: code has to be fetched, too, which takes
  // longer than the sums. These are in the order of the keys whatever fits into shared memory.
  __device__ __forceinline__ void run(A& a, const Pieces& c, bool idle) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
    const int tile = warp & (p.row_tiles - 1);
    a.close();
    if (p.row_tiles == 1)  // the others of the team may still read the stage
      __syncwarp();
    else
      named_barrier(1 + (warp >> p.row_shift), 32 * p.row_tiles);
    float* own = reinterpret_cast<float*>(stage + warp * L::kSlice);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = g + 8 * i;
      if (tile * 16 + row >= item.rows) continue;
      a.store(own, i, a.to_own_max(p, i));
      if (lane % 4 == 0) states()[warp * 16 + row] = make_float2(a.m[i], a.l[i]);
    }
    __syncthreads();
    const int column = threadIdx.x % (kColumns / 4) * 4, first_row = threadIdx.x / (kColumns / 4);
    const int group = c.ordinal / c.fan, groups = (c.count + c.fan - 1) / c.fan;
    // Without further items to load the whole ring is free, else the stage.
    const uint32_t area = shared_address(idle ? shared : stage);
    bool warps = true, last = c.count == 1;
    int count = kDecodeWarps >> p.row_shift, first = c.index(c.ordinal), start = 0, between = 0;
    int slots = count, rows_at_once = item.rows;
    uint32_t pairs = shared_address(states());
    int pair_step = 16 * 8 << p.row_shift, x_step = L::kSlice << p.row_shift;
#pragma unroll 1
    for (bool top_level = groups == 1;;) {
      bool fresh = !warps;  // the pieces' maxima and sums are still to come
      const uint32_t slot = area + (count * pair_step & ~15) + 16 + threadIdx.x * 16;
#pragma unroll 1
      for (int begin = first_row; begin < item.rows || fresh; begin += rows_at_once) {
        const int end = column < p.dim ? min(begin + rows_at_once, item.rows) : 0;
        float top = kMinusInf, origin = 0.0f, sum = 0.0f;
        float4 o = make_float4(0, 0, 0, 0);
        // More than one round only for one row at a time.
#pragma unroll 1
        for (int from = 0; from < count; from += slots) {
          const int n = min(slots, count - from);
          if (!warps) {
            uint32_t to = slot;
#pragma unroll 1
            for (int row = begin; row < end; row += kRowStep) {
              const int at = row * p.dim + column;
              const float* other = partial(start + from * between) + at;
              const float* part = from == 0 ? partial(first) + at : other;
              const int64_t apart = static_cast<int64_t>(between) * block_rows() * p.dim;
#pragma unroll 4
              for (int k = 0; k < n; ++k) {
                cp_async_16(to, part, true);
                other += apart;
                part = other;
                to += x_step;
              }
            }
            cp_async_commit();
            cp_async_wait<0>();
            if (fresh) {
              __syncwarp();
              __syncthreads();
            }
            fresh = false;
          }
          uint32_t x = slot;
#pragma unroll 1
          for (int row = begin; row < end; row += kRowStep) {
            if (warps)
              x = shared_address(stage) + row / 16 * L::kSlice +
                  (row % 16 * L::kMergePitch + column) * 4;
            const uint32_t pair = pairs + row * 8;
            if (from == 0) {
              top = kMinusInf, sum = 0.0f, o = make_float4(0, 0, 0, 0);
#pragma unroll 4
              for (int k = 0; k < count; ++k)
                top = fmaxf(top, A::shared_pair(pair + k * pair_step).x);
              origin = finite_origin(top);
            }
            add(n, pair + from * pair_step, pair_step, x, x_step, origin, sum, o);
            x += n * x_step;
            if (from + n < count) continue;
            if (last) {
              emit(row, column, o, top, sum);
            } else {
              *reinterpret_cast<float4*>(partial(first) + row * p.dim + column) = o;
              if (column == 0)
                *reinterpret_cast<float2*>(partial_ml(first) + 2 * row) = make_float2(top, sum);
            }
          }
        }
      }
      if (last) break;
      int begin = 0, step = c.fan;
      count = groups;
      if (!top_level || groups == 1)
        begin = group * c.fan, count = min(c.fan, c.count - begin), step = 1;
      if (!arrive(top_level ? c.done : c.group_counter(group), count)) break;
      last = top_level;
      top_level = true;
      warps = false;
      first = c.index(begin);
      // What lies between neighbours; piece 0 of an unfixed item is out of line.
      between = (c.fixed ? 1 : 2 * c.step) * step;
      start = begin == 0 && !c.fixed ? 2 * c.base : first;
      pairs = area;
      pair_step = item.rows * 8;
      x_step = kDecodeThreads * 16;
      slots = ((idle ? L::kStages : 1) * L::kStage - count * pair_step - 32) / x_step;
      rows_at_once = max(slots / count, 1) * kRowStep;
#pragma unroll 1
      for (int i = threadIdx.x; i < count * item.rows; i += kDecodeThreads) {
        const int k = static_cast<unsigned>(i) / static_cast<unsigned>(item.rows);
        cp_async_8(area + i * 8,
                   partial_ml(k == 0 ? first : start + k * between) + 2 * (i - k * item.rows));
      }
    }
    __syncthreads();  // the stage, the states and the flag may be written again
  }
};

}  // namespace fastinfer::cuda
