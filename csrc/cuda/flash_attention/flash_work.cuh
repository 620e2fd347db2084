// What one tile of query rows has to do: which sequence and head it belongs to, which keys it sees,
// where its rows and keys lie. Shared by the portable and the sm_90a kernel.
#pragma once

#include <type_traits>

#include "../common/dtype.cuh"
#include "../common/reduce.cuh"
#include "../ptx/mma.cuh"
#include "flash_attention.h"

namespace fastinfer::cuda::flash {

constexpr float kLog2e = 1.44269504088896f;
constexpr float kLn2 = 0.693147180559945f;

// Rows [row, row + tile) of head `head` of sequence `batch`.
struct Work {
  int32_t batch, head, row;
  int32_t start_q, len_q;  // first row of the sequence in a packed q; 0 for a dense one
  int32_t start_k, len_k;  // likewise for keys
};

// Dense tiles. Heads of all batches in sections of p.section, whose keys fit the L2 cache together;
// in a section the last rows first (they see the most keys under a causal mask), and heads fastest:
// those that share keys run at the same time.
__device__ __forceinline__ Work dense_work(const FlashAttentionParams& p, int32_t index,
                                           int32_t tile_rows) {
  const int32_t tiles = (p.len_q + tile_rows - 1) / tile_rows;
  const int32_t per_section = p.section * tiles;
  const int32_t section = index / per_section, inside = index - section * per_section;
  const int32_t first = section * p.section;
  const int32_t width = min(p.section, p.batch * p.heads_q - first);
  // Every second section backwards, the last one forwards: lengths change smoothly from tile to
  // tile, so that dealing them out in turns gives everybody the same amount.
  const int32_t sections = (p.batch * p.heads_q - 1) / p.section + 1;
  const int32_t place = inside / width;
  const int32_t level = (sections - 1 - section) % 2 ? tiles - 1 - place : place;
  const int32_t unit = first + inside - place * width, batch = unit / p.heads_q;
  return {batch, unit - batch * p.heads_q, (tiles - 1 - level) * tile_rows, 0, p.len_q, 0, p.len_k};
}

__device__ __forceinline__ void packed_lengths(const FlashAttentionParams& p, Work& w) {
  const int64_t b = w.batch;
  w.start_q = p.cu_q[b * p.cu_q_stride];
  w.len_q = p.cu_q[(b + 1) * p.cu_q_stride] - w.start_q;
  w.start_k = p.cu_k && !p.table ? p.cu_k[b * p.cu_k_stride] : 0;
  w.len_k = p.used_k ? p.used_k[b * p.used_k_stride]
                     : p.cu_k[(b + 1) * p.cu_k_stride] - p.cu_k[b * p.cu_k_stride];
}

// Packed tiles: sequence after sequence, in each the last rows first, heads fastest. Called by a
// whole warp; false past the end.
__device__ __forceinline__ bool packed_work(const FlashAttentionParams& p, int32_t index,
                                            int32_t tile_rows, Work& w) {
  const int32_t lane = threadIdx.x % 32;
  const int32_t tile = index / p.heads_q;
  w.head = index - tile * p.heads_q;
  int32_t before = 0;
  for (int32_t first = 0; first < p.batch; first += 32) {
    const int64_t b = first + lane;
    int32_t count = 0;
    if (b < p.batch) {
      const int32_t rows = p.cu_q[(b + 1) * p.cu_q_stride] - p.cu_q[b * p.cu_q_stride];
      count = rows > 0 ? (rows - 1) / tile_rows + 1 : 0;
    }
    int32_t sum = count;  // of this lane and the ones below
#pragma unroll
    for (int32_t d = 1; d < 32; d *= 2) {
      const int32_t other = __shfl_up_sync(kAllLanes, sum, d);
      if (lane >= d) sum += other;
    }
    const unsigned reached = __ballot_sync(kAllLanes, before + sum > tile);
    if (reached) {
      const int32_t owner = __ffs(reached) - 1;
      const int32_t last = before + __shfl_sync(kAllLanes, sum, owner);
      w.batch = first + owner;
      w.row = (last - 1 - tile) * tile_rows;
      packed_lengths(p, w);
      return true;
    }
    before += __shfl_sync(kAllLanes, sum, 31);
  }
  return false;
}

// Keys that some row of the tile sees: [begin, end); begin == end: none. Query row i of a sequence
// stands at key position i + len_k - len_q.
struct Range {
  int32_t begin, end;
};
__device__ __forceinline__ Range visible(const FlashAttentionParams& p, const Work& w, int32_t row,
                                         int32_t rows) {
  const int32_t shift = w.len_k - w.len_q;
  const int32_t last = min(row + rows, w.len_q) - 1;
  Range r{0, w.len_k};
  if (p.window_left >= 0) r.begin = max(0, row + shift - p.window_left);
  if (p.window_right >= 0) r.end = min(w.len_k, last + shift + p.window_right + 1);
  return r.begin < r.end && row < w.len_q ? r : Range{0, 0};
}

// Scores leave as log2(e) times the score when there is anything but a positive scale: softcap,
// ALiBi, per-key scales. Else the scale is folded into the exponent.
__device__ __forceinline__ bool folded_scale(const FlashAttentionParams& p) {
  return p.softcap == 0.0f && !p.alibi && p.scale > 0.0f;
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 - 2 / (1 + e^2x): absolute error 2e-7, which tanh.approx (5e-4) is far from.
__device__ __forceinline__ float tanh_accurate(float x) {
  return 1.0f - __fdividef(2.0f, 1.0f + exp2_approx(2.0f * kLog2e * fminf(x, 30.0f)));
}

// Softcap and ALiBi on the accumulators of one warp tile of 16 rows: element 4 j + e of a thread is
// row (e / 2 ? row1 : row0), column first + 8 j + e % 2. Afterwards scores are in units of log2.
// `at0`, `at1`: key positions of the two rows.
template <int kN>
__device__ __forceinline__ void modify_scores(const FlashAttentionParams& p, float (&s)[kN],
                                              float slope, int32_t first, int32_t at0,
                                              int32_t at1) {
#pragma unroll
  for (int i = 0; i < kN; ++i) s[i] *= p.inner;
  if (p.softcap > 0.0f) {
#pragma unroll
    for (int i = 0; i < kN; ++i) s[i] = p.outer * tanh_accurate(s[i]);
  }
  if (p.alibi) {
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const int32_t column = first + 8 * (i / 4) + i % 2;
      s[i] -= slope * static_cast<float>(abs((i % 4 / 2 ? at1 : at0) - column));
    }
  }
}

__device__ __forceinline__ float alibi_slope(const FlashAttentionParams& p, const Work& w) {
  return p.alibi ? p.alibi[w.batch * p.alibi_batch + w.head * p.alibi_head] * kLog2e : 0.0f;
}

// -inf from column right0 (right1) on, or below left0 (left1); columns as above.
template <int kN>
__device__ __forceinline__ void mask_right(float (&s)[kN], int32_t first, int32_t right0,
                                           int32_t right1) {
#pragma unroll
  for (int i = 0; i < kN; ++i)
    if (8 * (i / 4) + i % 2 >= (i % 4 / 2 ? right1 : right0) - first) s[i] = -INFINITY;
}
template <int kN>
__device__ __forceinline__ void mask_left(float (&s)[kN], int32_t first, int32_t left0,
                                          int32_t left1) {
#pragma unroll
  for (int i = 0; i < kN; ++i)
    if (8 * (i / 4) + i % 2 < (i % 4 / 2 ? left1 : left0) - first) s[i] = -INFINITY;
}

// Keys that one row sees, for the masks.
__device__ __forceinline__ Range row_limits(const FlashAttentionParams& p, const Work& w,
                                            int32_t row) {
  const int32_t at = row + w.len_k - w.len_q;
  return {p.window_left < 0 ? 0 : at - p.window_left,
          p.window_right < 0 ? w.len_k : min(w.len_k, at + p.window_right + 1)};
}

// Online softmax of two rows per thread. max is in the units of the scores; `factor` takes them to
// log2. Sums are of this thread's columns only until finish().
struct RowState {
  float max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};

  // Takes the scores of one more tile into the maximum: origin[r] is what to subtract in the
  // exponent, keep[r] what earlier sums and outputs have to be multiplied by. kChains: independent
  // chains per row. Nothing here or below is left to contraction: a row's bits must not depend on
  // which copy of the code it runs through, and a tile without visible keys must leave them alone.
  template <int kChains, int kN>
  __device__ __forceinline__ void raise(const float (&s)[kN], float factor, float (&origin)[2],
                                        float (&keep)[2]) {
    float high[2][2] = {{max[0], -INFINITY}, {max[1], -INFINITY}};
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      float& x = high[i % 4 / 2][i % kChains];
      x = fmaxf(x, s[i]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = fmaxf(high[r][0], high[r][1]);
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      // A row that has seen no key yet: exp2(-inf - 0) = 0 where -inf - -inf would be NaN.
      origin[r] = top == -INFINITY ? 0.0f : __fmul_rn(top, factor);
      keep[r] = exp2_approx(__fsub_rn(__fmul_rn(max[r], factor), origin[r]));  // 1 if top == max
      max[r] = top;
    }
  }

  // Scores become probabilities. Sums lag behind by kLag exponentials and start with the newest:
  // a warp issues in order, and would wait for each exponential in turn.
  // between(i) is other work, in kN / 8 pieces, that the compiler may put between them.
  template <int kChains, int kN, class F>
  __device__ __forceinline__ void exponents(float (&s)[kN], float factor, const float (&origin)[2],
                                            const float (&keep)[2], F between) {
    constexpr int kLag = 8;
    static_assert(kN % kLag == 0, "whole groups");
    float part[2][2] = {{__fmul_rn(sum[0], keep[0]), 0.0f}, {__fmul_rn(sum[1], keep[1]), 0.0f}};
#pragma unroll
    for (int first = 0; first <= kN; first += kLag) {
#pragma unroll
      for (int i = first; i < first + kLag && i < kN; ++i)
        s[i] = exp2_approx(__fmaf_rn(s[i], factor, -origin[i % 4 / 2]));
#pragma unroll
      for (int i = first - 1; i >= first - kLag && i >= 0; --i) {
        float& x = part[i % 4 / 2][i % kChains];
        x = __fadd_rn(x, s[i]);
      }
      if (first < kN) between(first / kLag);
    }
    sum[0] = __fadd_rn(part[0][0], part[0][1]);
    sum[1] = __fadd_rn(part[1][0], part[1][1]);
  }
  template <int kChains, int kN>
  __device__ __forceinline__ void exponents(float (&s)[kN], float factor, const float (&origin)[2],
                                            const float (&keep)[2]) {
    exponents<kChains>(s, factor, origin, keep, [](int) {});
  }

  // Sums of the rows over the quad.
  __device__ __forceinline__ void totals(float (&total)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[r] = sum[r];
      total[r] += __shfl_xor_sync(kAllLanes, total[r], 1);
      total[r] += __shfl_xor_sync(kAllLanes, total[r], 2);
    }
  }
  // With the sink's term: what the output has to be multiplied by; sets lse.
  __device__ __forceinline__ float finish(int r, float total, float factor,
                                          const FlashAttentionParams& p, float sink, float& lse) {
    if (total == 0.0f) {
      lse = -INFINITY;
      return 0.0f;
    }
    float top = max[r] * factor, weight = 1.0f;
    if (p.sinks) {
      const float higher = fmaxf(top, sink);
      weight = exp2_approx(top - higher);
      total = total * weight + exp2_approx(sink - higher);
      top = higher;
    }
    if (p.lse) lse = top * kLn2 + logf(total);
    return __fdividef(weight, total);
  }
};

__device__ __forceinline__ float sink_logit(const FlashAttentionParams& p, int32_t head) {
  if (!p.sinks) return 0.0f;
  const int64_t i = head * p.sinks_stride;
  const float x = p.sinks_dtype == DType::f32 ? static_cast<const float*>(p.sinks)[i]
                  : p.sinks_dtype == DType::f16
                      ? to_float(static_cast<const __half*>(p.sinks)[i])
                      : to_float(static_cast<const __nv_bfloat16*>(p.sinks)[i]);
  return x * kLog2e;
}

// Two neighbouring values as 16-bit, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  return pack_half2<std::is_same_v<T, __nv_bfloat16>>(low, high);
}

// Word i of lane t of a quad goes to word t of lane i: four column blocks of 16 bytes, spread over
// the quad in 4-byte pieces, become one whole block per lane.
__device__ __forceinline__ void transpose_quad(uint32_t* w) {
  const int lane = threadIdx.x;
  const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(kAllLanes, odd ? w[i] : w[i + 1], 1);
    (odd ? w[i] : w[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(kAllLanes, upper ? w[i] : w[i + 2], 2);
    (upper ? w[i] : w[i + 2]) = got;
  }
}

// 16 bytes to global memory where `really`; no branch, so that many can be under way.
__device__ __forceinline__ void store_16(void* to, const uint32_t* w, bool really) {
  asm volatile(
      "{\n.reg .pred really;\nsetp.ne.u32 really, %5, 0;\n"
      "@really st.global.v4.b32 [%0], {%1, %2, %3, %4};\n}" ::"l"(to),
      "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(static_cast<uint32_t>(really))
      : "memory");
}

// Rows row0 and row1 of a warp tile of 16 rows (o as for modify_scores, kD columns), each times its
// factor (0: zeros, whatever o holds), to `out` (row 0 of the sequence and head). `packs`: 16-byte
// stores are possible.
template <class T, int kD>
__device__ __forceinline__ void store_rows(T* out, int64_t stride, int32_t head_dim, bool packs,
                                           const float (&o)[kD / 2], int32_t row0, int32_t row1,
                                           int32_t end, float factor0, float factor1) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t row = half ? row1 : row0;
    const float factor = half ? factor1 : factor0;
    T* const to = out + row * stride + 8 * t;
    uint32_t w[kD / 8];
#pragma unroll
    for (int i = 0; i < kD / 8; ++i) {
      const float* x = o + 4 * i + 2 * half;
      w[i] = factor == 0.0f ? 0u : pack2<T>(x[0] * factor, x[1] * factor);
    }
#pragma unroll
    for (int j = 0; j < kD / 8; j += 4) transpose_quad(w + j);
    if (packs) {
#pragma unroll
      for (int j = 0; j < kD / 8; j += 4)
        store_16(to + 8 * j, w + j, row < end && 8 * (j + t) < head_dim);
    } else if (row < end) {
#pragma unroll
      for (int j = 0; j < kD / 8; j += 4) {
        if (8 * (j + t) >= head_dim) continue;
#pragma unroll
        for (int i = 0; i < 8; ++i)
          to[8 * j + i] = reinterpret_cast<const T*>(w + j + i / 2)[i % 2];
      }
    }
  }
}

}  // namespace fastinfer::cuda::flash
