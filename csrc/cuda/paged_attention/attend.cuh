// The arithmetic of one warp: 16 packed query rows against slices of keys.
//
//   x = score in the log2 domain, m = running max, l += 2^(x - m), O = O * 2^(m_old - m) + 2^(x -
//   m) V
//
// (Dao et al. 2022), fp32 but for the operands of the two products. A masked key has weight 0
// exactly, and where no max moves the rescaling, by 1, is left out: neither changes a bit.
//
// 16-bit caches: both products at the type of the cache. 8-bit ones: in fp16; columns of a 16-byte
// segment are then permuted alike in Q and K: thread t of a quad holds columns 4t .. 4t+3 of K as
// ldmatrix delivers them, and of O. A row of bf16 queries is scaled by a power of two into fp16's
// range. Scales per token: K's multiplies the score; V's joins the weight before it is rounded, in
// a running unit of its own (`unit_o`), so that no magnitude of scales can leave fp16's range.
#pragma once

#include "../common/dtype.cuh"
#include "../ptx/mma.cuh"
#include "convert.cuh"
#include "layout.cuh"

namespace fastinfer::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kMinusInf = -__builtin_huge_valf();

// 1 - 2 / (1 + e^2x): error of about an ulp of 1, a tenth of the instructions of tanhf.
__device__ __forceinline__ float tanh_exp(float x) {
  return 1.0f - __fdividef(2.0f, 1.0f + exp2_approx(x * (2.0f * kLog2e)));
}

// What does not change while a piece is worked on.
struct Item {
  int b, head, row_block;  // kv head
  int rows;                // of the block, <= 16 * row_tiles
  int len;
  int first, last;  // keys [first, last) are visible to some row of the block
  int low, high;    // keys outside are masked for some row
};

__device__ __forceinline__ float finite_origin(float m) { return m == kMinusInf ? 0.0f : m; }

template <class F, int D, bool kSoft, class Shape>
struct Attend {
  using L = Shape;
  static constexpr bool k8 = F::kBytes == 1;
  static constexpr int kColumns = D;
  static constexpr int kSteps = D / 16;           // of 16 columns
  static constexpr int kBlocks = L::kTokens / 8;  // of 8 keys
  // Slices that one step takes: two give the products twice the independent chains. 8-bit slices
  // are long enough, and at D = 256 there are no registers left.
  static constexpr int kJoint = !k8 && D <= 128 ? 2 : 1;

  float o[D / 8][4];
  float m[2], l[2];
  float unit_o[2];  // of O, with V scales per token
  float factor[2];  // of the raw score of rows g, g + 8
  float slope[2];
  int at[2];  // key position of the row
  int low[2], high[2];
  uint32_t q[L::kQueryInShared ? 1 : kSteps][4];
  uint32_t q_at;  // of this lane's rows of the query in shared memory

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < D / 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) o[i][j] = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) m[i] = kMinusInf, l[i] = unit_o[i] = 0.0f;
  }

  // Fragments of 16 columns: rows r, columns 8 * (lane / 16) .. of the staged query.
  __device__ __forceinline__ void get_query(int step, uint32_t (&a)[4]) const {
    if constexpr (L::kQueryInShared) {
      ldmatrix_x4(a, q_at + step * 32);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) a[j] = q[step][j];
    }
  }

  // The block's queries into shared memory, a warp per row, as fp16 or bf16 operands: zeros past
  // the end; for an 8-bit cache columns 4t, 4t + 1 of 16 where ldmatrix expects 2t, 2t + 1, the
  // other pairs 8 columns further. Its bf16 queries become fp16: the largest magnitude of a row
  // goes to [1, 2), what is above 2^-24 of it is kept; `unit` takes the factor.
  template <class P>
  static __device__ __forceinline__ void stage_query(const P& p, const Item& item, uint32_t to,
                                                     float* unit) {
    constexpr int kWords = D / 64, kRows = 4;  // pairs of columns of a lane, rows at a time
    const int block = item.row_block * p.row_tiles * 16;
#pragma unroll 1
    for (int first = threadIdx.x / 32; first < item.rows; first += kRows * P::kWarps) {
      uint32_t x[kRows][kWords];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = first + i * P::kWarps, r = block + row;
        const int token = p.q_len == 1 ? 0 : r / p.group;
        const int head = item.head * p.group + r - token * p.group;
        const uint16_t* from = static_cast<const uint16_t*>(p.q) + item.b * p.q_batch +
                               token * p.q_token + head * p.q_head;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          const int column = 2 * (lane() + 32 * w);
          x[i][w] = 0;
          if (row < item.rows && column < p.dim)
            x[i][w] = *reinterpret_cast<const uint32_t*>(from + column);
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = first + i * P::kWarps;
        if (row >= item.rows) break;
        if constexpr (k8)
          if (p.q_dtype == DType::bf16) halve(x[i], unit + row);
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          int word = lane() + 32 * w;
          if constexpr (k8) word = (word & ~7) + (word & 1) * 4 + (word >> 1 & 3);
          asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + row * L::kQueryPitch + word * 4),
                       "r"(x[i][w])
                       : "memory");
        }
      }
    }
  }

  template <int kWords>
  static __device__ __forceinline__ void halve(uint32_t (&x)[kWords], float* unit) {
    uint32_t top = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) top = max(top, max(x[w] & 0x7FFFu, x[w] >> 16 & 0x7FFFu));
    top = __reduce_max_sync(kAllLanes, top);
    // Exponent 1 .. 253 of fp32; zeros, subnormals, inf and NaN are left as they are.
    const uint32_t e = top >> 7;
    const bool scaled = e >= 1 && e <= 253;
    const float up = scaled ? __uint_as_float((254 - e) << 23) : 1.0f;
#pragma unroll
    for (int w = 0; w < kWords; ++w)
      x[w] = pack_half2<false>(__uint_as_float(x[w] << 16) * up,
                               __uint_as_float(x[w] & 0xFFFF0000u) * up);
    if (lane() == 0) *unit = scaled ? __uint_as_float(e << 23) : 1.0f;
  }

  // Rows g and g + 8 of row tile `tile` of the block: their queries, which stage_query() put to
  // `from`, masks and factors. Rows past the end repeat the last one.
  template <class P>
  __device__ __forceinline__ void load_rows(const P& p, const Item& item, int tile, uint32_t from,
                                            const float* unit) {
    const int last = item.rows - 1;
    q_at = from + min(tile * 16 + lane() % 16, last) * L::kQueryPitch + lane() / 16 * 16;
    if constexpr (!L::kQueryInShared) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) ldmatrix_x4(q[s], q_at + s * 32);
    }
    float scale = p.scale * (p.softcap > 0.0f ? 1.0f / p.softcap : kLog2e);
    if (k8 && !p.scale_per_token_k) scale *= __ldg(p.k_scale + item.head * p.ks_head);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int in_block = min(tile * 16 + lane() / 4 + 8 * i, last);
      const int r = item.row_block * p.row_tiles * 16 + in_block;
      const int token = p.q_len == 1 ? 0 : r / p.group;
      factor[i] = scale;
      if (k8 && p.q_dtype == DType::bf16) factor[i] *= unit[in_block];
      at[i] = item.len - p.q_len + token;
      low[i] = item.first;
      high[i] = item.len;
      if (p.window_left >= 0) low[i] = max(low[i], at[i] - p.window_left);
      if (p.window_right >= 0) high[i] = min(high[i], at[i] + p.window_right + 1);
      slope[i] = 0.0f;
      if (p.alibi) {
        const int head = item.head * p.group + r - token * p.group;
        slope[i] = __ldg(p.alibi + item.b * p.alibi_batch + head * p.alibi_head) * kLog2e;
      }
    }
  }

  // To be xored with the offset, a multiple of 32, of a pair of 16-byte segments of a row r, modulo
  // 8: the first (0) or second (1) of the pair.
  static __device__ __forceinline__ uint32_t segment(int second, int r) {
    return (L::kBoxes ? second ^ r : second) * 16;
  }

  template <int kSlices>
  __device__ __forceinline__ void scores(uint32_t slice, float (&x)[kSlices * kBlocks][4]) const {
#pragma unroll
    for (int i = 0; i < kSlices * kBlocks; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) x[i][j] = 0.0f;
    const int i = lane() / 8, r = lane() % 8;
    if constexpr (!k8) {
      const uint32_t at_lane = slice + ((i / 2) * 8 + r) * L::kPitch + (i % 2) * 16;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        uint32_t a[4];
        get_query(s, a);
#pragma unroll
        for (int n = 0; n < kSlices; ++n) {
          uint32_t k[4];
          ldmatrix_x4(k, at_lane + n * L::kSlice + s * 32);
          mma_16816<F::kBf16>(x[2 * n], a, k[0], k[1]);
          mma_16816<F::kBf16>(x[2 * n + 1], a, k[2], k[3]);
        }
      }
    } else {
      const uint32_t turn = segment(i / 2, r);
      const uint32_t at_lane = slice + ((i % 2) * 8 + r) * L::kPitch;
#pragma unroll
      for (int s = 0; s < kSteps; s += 2) {
        uint32_t a[2][4];
        get_query(s, a[0]);
        get_query(s + 1, a[1]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t k[4];
          ldmatrix_x4(k, at_lane + half * 16 * L::kPitch + (s * 16 ^ turn));
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const HalfPairs b = halves_from_codes<F::kE4m3, kSoft>(k[j]);
            mma_16816<false>(x[2 * half + j % 2], a[j / 2], b.low, b.high);
          }
        }
      }
    }
  }

  // o += weights of keys 16 * half .. times their values.
  __device__ __forceinline__ void values(uint32_t slice, int half, const uint32_t (&a)[4]) {
    const int i = lane() / 8, r = lane() % 8;
    constexpr int kHalves = L::kTokens / 16;
    const uint32_t at_lane = slice + half / kHalves * L::kSlice + L::kV +
                             (half % kHalves * 16 + (i % 2) * 8 + r) * L::kPitch;
    const uint32_t turn = segment(i / 2, r);
    if constexpr (!k8) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        uint32_t v[4];
        ldmatrix_x4_trans(v, at_lane + (s * 32 ^ turn));
        mma_16816<F::kBf16>(o[2 * s], a, v[0], v[1]);
        mma_16816<F::kBf16>(o[2 * s + 1], a, v[2], v[3]);
      }
    } else {
#pragma unroll
      for (int s = 0; s < kSteps; s += 2) {
        uint32_t v[4];
        ldmatrix_x4_trans(v, at_lane + (s * 16 ^ turn));
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          // Bytes: (key 2t; even, odd column), (key 2t + 1; even, odd column).
          const HalfPairs b0 = halves_from_codes<F::kE4m3, kSoft>(__byte_perm(v[2 * j], 0, 0x3120));
          const HalfPairs b1 =
              halves_from_codes<F::kE4m3, kSoft>(__byte_perm(v[2 * j + 1], 0, 0x3120));
          mma_16816<false>(o[2 * (s + j)], a, b0.low, b1.low);
          mma_16816<false>(o[2 * (s + j) + 1], a, b0.high, b1.high);
        }
      }
    }
  }

  // Keys first .. first + kSlices * kTokens - 1, which lie in `slice` and the one behind it.
  template <int kSlices, class P>
  __device__ __forceinline__ void step(const P& p, const Item& item, uint32_t slice, int first) {
    const int t = lane() % 4;
    static_assert(kSlices == 1 || !k8, "scales are those of one slice");
    constexpr int kN = kSlices * kBlocks;
    float x[kN][4];
    scores<kSlices>(slice, x);
    const bool masked = first < item.low || first + kSlices * L::kTokens > item.high;
    [[maybe_unused]] float v_scale[kN][2];
    [[maybe_unused]] const bool v_scaled = k8 && p.scale_per_token_v;
    float top[2] = {kMinusInf, kMinusInf};
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const int in_slice = 8 * n + 2 * t;
      if constexpr (k8) {
        if (p.scale_per_token_k) {
          const float2 s = shared_pair(slice + L::kScales + in_slice * 4);
          x[n][0] *= s.x, x[n][1] *= s.y, x[n][2] *= s.x, x[n][3] *= s.y;
        }
        if (v_scaled) {
          const float2 s = shared_pair(slice + L::kScales + (L::kTokens + in_slice) * 4);
          v_scale[n][0] = s.x, v_scale[n][1] = s.y;
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = j / 2, key = first + in_slice + j % 2;
        float y = x[n][j] * factor[i];
        if (p.softcap > 0.0f) y = p.softcap * kLog2e * tanh_exp(y);
        if (p.alibi) y -= slope[i] * static_cast<float>(abs(at[i] - key));
        if (masked && (key < low[i] || key >= high[i])) y = kMinusInf;
        x[n][j] = y;
        top[i] = fmaxf(top[i], y);
      }
    }
    float keep[2], origin[2];
    bool moved = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = fmaxf(top[i], __shfl_xor_sync(kAllLanes, top[i], 1));
      top[i] = fmaxf(fmaxf(top[i], __shfl_xor_sync(kAllLanes, top[i], 2)), m[i]);
      origin[i] = finite_origin(top[i]);
      keep[i] = exp2_approx(m[i] - origin[i]);
      l[i] *= keep[i];
      m[i] = top[i];
      moved = moved || keep[i] != 1.0f;
    }
    if constexpr (k8)
      if (v_scaled) moved = scale_weights(x, v_scale, origin, keep);
    if (__any_sync(kAllLanes, moved)) {
#pragma unroll
      for (int i = 0; i < D / 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) o[i][j] *= keep[j / 2];
    }
#pragma unroll
    for (int half = 0; half < kN / 2; ++half) {
      uint32_t a[4];
#pragma unroll
      for (int n = 2 * half; n < 2 * half + 2; ++n) {
        float w[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int i = j / 2;
          if (k8 && v_scaled) {
            w[j] = x[n][j];
          } else {
            w[j] = exp2_approx(x[n][j] - origin[i]);
            l[i] += w[j];
          }
        }
        a[(n % 2) * 2] = pack_half2<F::kBf16>(w[0], w[1]);
        a[(n % 2) * 2 + 1] = pack_half2<F::kBf16>(w[2], w[3]);
      }
      values(slice, half, a);
    }
  }

  // Scores become weights times the V scale of their key, in units of unit_o[i]. That grows when
  // one of them would exceed 1: then true, and O, which is in that unit, is to be multiplied by
  // `keep`. Where only the maximum of the scores moves it is the unit that shrinks.
  template <int kN>
  __device__ __forceinline__ bool scale_weights(float (&x)[kN][4], const float (&v_scale)[kN][2],
                                                const float (&origin)[2], float (&keep)[2]) {
    float top[2] = {0.0f, 0.0f};
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float w = exp2_approx(x[n][j] - origin[j / 2]);
        l[j / 2] += w;
        x[n][j] = w * v_scale[n][j % 2];
        top[j / 2] = fmaxf(top[j / 2], fabsf(x[n][j]));
      }
    bool grown = false;
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = fmaxf(top[i], __shfl_xor_sync(kAllLanes, top[i], 1));
      top[i] = fmaxf(top[i], __shfl_xor_sync(kAllLanes, top[i], 2));
      const float before = unit_o[i] * keep[i];
      const bool grows = top[i] > before;
      unit_o[i] = grows ? fminf(2.0f * top[i], 8e37f) : before;
      inverse[i] = unit_o[i] >= 1e-37f ? __fdividef(1.0f, unit_o[i]) : 0.0f;
      keep[i] = grows ? before * inverse[i] : 1.0f;
      grown = grown || grows;
    }
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) x[n][j] *= inverse[j / 2];
    return grown;
  }

  static __device__ __forceinline__ float2 shared_pair(uint32_t address) {
    float2 r;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(r.x), "=f"(r.y)
                 : "r"(address)
                 : "memory");
    return r;
  }

  // Sums over the quad.
  __device__ __forceinline__ void close() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      l[i] += __shfl_xor_sync(kAllLanes, l[i], 1);
      l[i] += __shfl_xor_sync(kAllLanes, l[i], 2);
    }
  }

  // Factor of the output of row g + 8 i that makes it relative to the row's maximum.
  template <class P>
  __device__ __forceinline__ float to_own_max(const P& p, int i) const {
    return k8 && p.scale_per_token_v ? unit_o[i] : 1.0f;
  }

  // Row g + 8 i, times weight, to a merge buffer (D + 4 floats apart).
  __device__ __forceinline__ void store(float* buffer, int i, float weight) const {
    const int g = lane() / 4, t = lane() % 4;
    float* row = buffer + (g + 8 * i) * L::kMergePitch;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const float a = o[2 * s][2 * i] * weight, b = o[2 * s][2 * i + 1] * weight;
      const float c = o[2 * s + 1][2 * i] * weight, d = o[2 * s + 1][2 * i + 1] * weight;
      if constexpr (k8) {
        *reinterpret_cast<float4*>(row + s * 16 + 4 * t) = make_float4(a, c, b, d);
      } else {
        *reinterpret_cast<float2*>(row + s * 16 + 2 * t) = make_float2(a, b);
        *reinterpret_cast<float2*>(row + s * 16 + 8 + 2 * t) = make_float2(c, d);
      }
    }
  }
};

}  // namespace fastinfer::cuda
