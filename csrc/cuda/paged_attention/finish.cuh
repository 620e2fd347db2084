// The end of a piece: the warps' states are merged through the stage that was read last (no copy
// goes to it until then), and leave as output, or as a partial result in the workspace.
//
// The CTA that finishes the last piece of an item opens its merge, which is done in chunks of rows;
// CTAs that have finished other pieces of it and have nothing left to do wait for that, not for
// long, and take chunks as well. Whoever does a chunk, the pieces are added up in the same order.
#pragma once

#include "../ptx/async_copy.cuh"
#include "../ptx/tma.cuh"
#include "emit.cuh"
#include "pieces.cuh"
#include "sums.cuh"

namespace fastinfer::cuda {

template <class A, class P>
struct Finish {
  using L = typename A::L;
  using S = Sums<A, P>;
  using Sum = typename S::Sum;
  static constexpr int kColumns = A::kColumns;  // D
  static constexpr int kRowThreads = kColumns / 4;
  static constexpr int kRowStep = P::kThreads / kRowThreads;
  static constexpr int kDealt = 192;  // (piece, row) pairs that one CTA merges about as fast
  static constexpr int kPolls = 32;   // of some 0.4 us
  static constexpr int kNoChunk = 1 << 16;
  static constexpr int kWidth = S::kWidth, kRows = S::kRows, kAhead = S::kAhead;
  static constexpr int kMostStaged = kColumns == 64 ? 144 : 288;  // maxima and sums of a row
  static constexpr int kPairs = P::kThreads / kWidth * kMostStaged * 8;
  static constexpr int kStep = P::kThreads * 16;
  static_assert(kPairs + kStep <= L::kStage);
  // So few pieces a thread weighs by itself, which needs no shuffles:
  // they fit into one stage, so that all that merge an item do.
  static constexpr int kFew = (L::kStage - kPairs) / kStep < 12 ? (L::kStage - kPairs) / kStep : 12;
  const P& p;
  const Item& item;
  char* shared;
  char* stage;  // first slice of the stage that is free

  __device__ __forceinline__ float2* states() const {
    return reinterpret_cast<float2*>(shared + L::kStates);
  }
  __device__ __forceinline__ int* flag() const {
    return reinterpret_cast<int*>(shared + L::kInts) + P::kWarps + 2;
  }
  __device__ __forceinline__ int block_rows() const { return min(p.rows, 16 * p.row_tiles); }

  __device__ __forceinline__ void emit(int row, int column, float4 o, float top, float sum) const {
    emit_row(p, item.b, item.head, item.row_block * p.row_tiles * 16 + row, column, o, top, sum);
  }

  __device__ __forceinline__ float* partial(int index) const {
    return p.partial + static_cast<int64_t>(index) * block_rows() * p.dim;
  }
  __device__ __forceinline__ float* partial_ml(int index) const {
    return p.partial_ml + static_cast<int64_t>(index) * block_rows() * 2;
  }

  // Everything this CTA wrote is visible to whoever gets `true`: the
  // last of `expected` arrivals.
  __device__ __forceinline__ bool arrive(int32_t* counter, int expected) const {
    __syncthreads();
    if (threadIdx.x == 0) {
      int before;
      asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;"
                   : "=r"(before)
                   : "l"(counter)
                   : "memory");
      *flag() = before == expected - 1;
    }
    __syncthreads();
    return *flag() != 0;
  }

  // The next chunk, once every piece is complete. Helpers, who are
  // not the CTA that saw to that, do not wait for ever: nobody relies
  // on them. A counter that is 0 again says that all is taken.
  __device__ __forceinline__ int claim(const Pieces& c, bool helper) const {
    __syncthreads();  // the flag has been read, and so has the chunk
                      // before
    if (threadIdx.x == 0) {
      int chunk = kNoChunk, seen = helper ? 1 : c.count;
#pragma unroll 1
      for (int i = 0; i < kPolls && seen != c.count && seen != 0; ++i)
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(c.done) : "memory");
      if (seen == c.count) chunk = atomicAdd(c.claims, 1) + 1;
      *flag() = chunk;
    }
    __syncthreads();
    return *flag();
  }

  // A thread has four columns of every kRowStep-th row.
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
    if (threadIdx.x == 0 && c.count > 1 && c.ordinal == 0) *c.claims = 0;
    __syncthreads();
    add_warps(c);
    if (c.count > 1) {
      const bool last = arrive(c.done, c.count);
      // Chunks of what goes into an idle ring, if there are many rows
      // so small that every CTA of the item may have one; or of one
      // row whose pieces are dealt to the teams of threads that
      // otherwise have a row each.
      const bool deal = !c.fixed && c.count >= 16 && c.count * item.rows > kDealt;
      constexpr int kRing = (L::kStages * L::kStage - kPairs) / kStep;
      int turns = max(kRing / c.count, 1);
      if (item.rows > 16) turns = min(turns, ((item.rows - 1) / kRowStep + c.count) / c.count);
      const int rows = deal ? 1 : turns * kRowStep;
      if (last || (idle && rows < item.rows)) {
#pragma unroll 1
        for (int first = last ? 0 : claim(c, true) * rows; first < item.rows;) {
          merge_chunk(c, first, rows, deal, idle);
          first = rows < item.rows ? claim(c, false) * rows : item.rows;
        }
        if (last && threadIdx.x == 0) *c.done = 0;
      }
    }
    if constexpr (L::kBoxes) ptx::proxy_fence_shared();  // also by boxes
    __syncthreads();  // the stage, the states and the flag may be
                      // written again
  }

  __device__ __forceinline__ void add_warps(const Pieces& c) const {
    const int column = threadIdx.x % kRowThreads * 4, count = P::kWarps >> p.row_shift;
    const uint32_t pair_step = 16 * 8 << p.row_shift, x_step = L::kSlice << p.row_shift;
    const int index = c.index(c.ordinal);
    if (column >= p.dim) return;
#pragma unroll 1
    for (int first = threadIdx.x / kRowThreads; first < item.rows; first += kRows * kRowStep) {
      uint32_t pair[kRows], x[kRows];
      Sum s[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = min(first + i * kRowStep, item.rows - 1);
        pair[i] = shared_address(states()) + row * 8;
        x[i] =
            shared_address(stage) + row / 16 * L::kSlice + (row % 16 * L::kMergePitch + column) * 4;
      }
      S::add_pieces(count, pair, pair_step, x, x_step, s);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = first + i * kRowStep;
        if (row >= item.rows) break;
        if (c.count == 1) {
          emit(row, column, s[i].o, s[i].top, s[i].sum);
          continue;
        }
        // As assignments of a float4 and a float2 these are six
        // stores.
        asm volatile(
            "st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(partial(index) + row * p.dim + column),
            "f"(s[i].o.x), "f"(s[i].o.y), "f"(s[i].o.z), "f"(s[i].o.w)
            : "memory");
        if (column == 0)
          asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(partial_ml(index) + 2 * row),
                       "f"(s[i].top), "f"(s[i].sum)
                       : "memory");
      }
    }
  }

  // All pieces of the rows of a chunk, as many rows at a time as fit,
  // or one row in several rounds. Maxima and sums come first: the
  // lanes of a row (a warp at most) make weights of them, one piece
  // each, while the outputs, of which every thread fetches what it
  // adds up, are on their way.
  __device__ __forceinline__ void merge_chunk(const Pieces& c, int first_row, int rows, bool deal,
                                              bool idle) const {
    const int team = threadIdx.x / kRowThreads, column = threadIdx.x % kRowThreads * 4;
    const int sub = deal ? team : 0, every = deal ? kRowStep : 1;
    const uint32_t area = shared_address(idle ? shared : stage);
    const uint32_t pairs = area + threadIdx.x / kWidth * kMostStaged * 8;
    const uint32_t data = area + kPairs + threadIdx.x * 16;
    const int slots = ((idle ? L::kStages : 1) * L::kStage - kPairs) / kStep;
    const int batch = deal ? 1 : max(slots / c.count, 1);
    const int lane = threadIdx.x % kWidth;
    const unsigned lanes = kWidth == 32 ? kAllLanes : 0xFFFFu << (threadIdx.x & 16);
    const int piece_size = block_rows() * p.dim;
    const int64_t apart = static_cast<int64_t>(c.apart()) * every * piece_size;
    const int end_row = min(first_row + rows, item.rows);
    float top = kMinusInf, sum = 0.0f;
    float4 o = make_float4(0, 0, 0, 0);
    int row = first_row + (deal ? 0 : team);
#pragma unroll 1
    while (row < end_row) {
      const int stop = min(row + batch * kRowStep, end_row);
#pragma unroll 1
      for (int block = 0; block < c.count; block += kMostStaged) {
        const int end = min(block + kMostStaged, c.count), count = end - block;
#pragma unroll 1
        for (int from = block + sub; from < end || from == block + sub; from += slots * every) {
          const int to = min(end, from + slots * every);
          const int pieces = deal ? max(to - from + kRowStep - 1, 0) / kRowStep : to - from;
          const bool head = from == block + sub;
          if (head) {
            uint32_t at = pairs;
#pragma unroll 1
            for (int r = row; r < stop; r += kRowStep, at += count * 8)
#pragma unroll 1
              for (int k = lane; k < count; k += kWidth)
                cp_async_8(at + k * 8, partial_ml(c.index(block + k)) + 2 * r);
          }
          cp_async_commit();
          uint32_t at = data;
#pragma unroll 1
          for (int r = row; r < stop && column < p.dim; r += kRowStep) {
            const float* source = partial(c.start() + from * c.apart()) + r * p.dim + column;
            const int first_off = from == 0 ? c.first_off() * piece_size : 0;
#pragma unroll 1
            for (int k = 0; k < pieces; k += kAhead, source += kAhead * apart)
#pragma unroll
              for (int i = 0; i < kAhead; ++i)
                if (k + i < pieces)
                  cp_async_16(at + (k + i) * kStep,
                              source + i * apart + (k + i == 0 ? first_off : 0), true);
            at += pieces * kStep;
          }
          cp_async_commit();
          if (!deal && c.count <= kFew) {
            cp_async_wait<0>();
            __syncwarp(lanes);
            if (column < p.dim) add_few(c.count, pairs, data, row, stop, column);
            continue;
          }
          cp_async_wait<1>();
          __syncwarp(lanes);
          at = data;
          uint32_t weights = pairs;
#pragma unroll 1
          for (int r = row; r < stop; r += kRowStep, weights += count * 8) {
            if (head) {
              const float before = block == 0 ? kMinusInf : top;
              if (block == 0) top = kMinusInf, sum = 0.0f, o = make_float4(0, 0, 0, 0);
              S::weigh(lane, lanes, count, weights, top, sum);
              const float keep = exp2_approx(before - finite_origin(top));
              o.x *= keep, o.y *= keep, o.z *= keep, o.w *= keep;
            }
            cp_async_wait<0>();
            const uint32_t weight = weights + (from - block) * 8;
            int k = 0;
            if constexpr (kAhead == 4) {
#pragma unroll 1
              for (; k + 4 <= pieces; k += 4) {
                float w[4];
                float4 v[4];
                S::load_four(weight + k * every * 8, every * 8, w);
                S::load_four(at + k * kStep, kStep, v);
#pragma unroll
                for (int i = 0; i < 4; ++i) S::add(w[i], v[i], o);
              }
            }
#pragma unroll 1
            for (; k < pieces; ++k)
              S::add(S::shared_float(weight + k * every * 8), S::shared_float4(at + k * kStep), o);
            at += pieces * kStep;
            if (!deal && block + count == c.count && to == end && column < p.dim)
              emit(r, column, o, top, sum);
          }
        }
        __syncwarp(lanes);  // the weights have been read
      }
      row = deal ? end_row : row + batch * kRowStep;
    }
    if (!deal) return;
    float4* all = reinterpret_cast<float4*>((idle ? shared : stage) + kPairs);
    all[threadIdx.x] = o;  // where this thread's first piece was
    __syncthreads();
    if (team > 0 || column >= p.dim) return;
#pragma unroll
    for (int i = 1; i < kRowStep; ++i) {
      const float4 other = all[threadIdx.x + i * kRowThreads];
      o.x += other.x, o.y += other.y, o.z += other.z, o.w += other.w;
    }
    emit(first_row, column, o, top, sum);
  }

  // Rows first, first + kRowStep .. below `stop` of a chunk, whose
  // `count` pieces are all there.
  __device__ __forceinline__ void add_few(int count, uint32_t pairs, uint32_t data, int first,
                                          int stop, int column) const {
#pragma unroll 1
    for (; first < stop; first += kRows * kRowStep) {
      uint32_t pair[kRows], x[kRows];
      Sum s[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const bool there = first + i * kRowStep < stop;
        pair[i] = pairs + (there ? i * count * 8 : 0);
        x[i] = data + (there ? i * count * kStep : 0);
      }
      S::add_pieces(count, pair, 8, x, kStep, s);
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        if (first + i * kRowStep < stop)
          emit(first + i * kRowStep, column, s[i].o, s[i].top, s[i].sum);
      pairs += kRows * count * 8;
      data += kRows * count * kStep;
    }
  }
};

}  // namespace fastinfer::cuda
