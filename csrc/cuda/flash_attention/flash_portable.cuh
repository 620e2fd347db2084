// Portable kernel (sm_80 and newer): mma.sync m16n8k16, keys and values through shared memory by
// cp.async.
//
// One CTA of 4 warps = one tile of query rows of one head; a warp owns kRows / 4 of them whole, so
// a row's sums stay in a quad of lanes. Q, K and V tiles lie in shared memory as rows of D
// elements, 16-byte chunk c of row r at chunk c ^ (r & 7): conflict-free for ldmatrix. K and V have
// one buffer each and are staggered: V loads under Q K^T, the next K under softmax and P V. Keys no
// row of the tile sees are never read: their rows are zero, so a NaN there cannot reach 0 * NaN.
//
// 8-bit codes are converted to T on the way to shared memory (exact: 8 significant bits at most);
// their scales multiply scores and probabilities per key.
#pragma once

#include <type_traits>

#include "../common/launch.cuh"
#include "../ptx/async_copy.cuh"
#include "../ptx/mma.cuh"
#include "flash_choice.h"
#include "flash_work.cuh"

namespace fastinfer::cuda::flash {

template <class T>
__device__ __forceinline__ void multiply(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
  mma_16816<std::is_same_v<T, __nv_bfloat16>>(*reinterpret_cast<float(*)[4]>(c),
                                              *reinterpret_cast<const uint32_t(*)[4]>(a), b0, b1);
}

constexpr int kPortableThreads = 128;
// Rows of a query tile: two 16-row blocks per warp where the output fits the registers.
constexpr int portable_rows(int dim, bool codes) {
  return dim <= 64 || (dim <= 128 && !codes) ? 128 : 64;
}
constexpr int kPortableKeys = 64;
constexpr size_t kSharedBytes = 128;  // struct Shared
constexpr size_t portable_shared_bytes(int dim, int rows) {
  return static_cast<size_t>(rows + 2 * kPortableKeys) * dim * 2 +
         2 * kPortableKeys * sizeof(float) + kSharedBytes;
}
static_assert(portable_shared_bytes(256, portable_rows(256, true)) <= 99 * 1024,
              "must fit the GPUs with 99 KiB (sm_86, 89)");

// Byte offset of chunk c (8 elements) of row r.
template <int kD>
__device__ __forceinline__ uint32_t chunk_at(int r, int c) {
  return static_cast<uint32_t>(r * kD * 2 + ((c ^ (r & 7)) << 4));
}

// Element offset of key `key`, of head 0, in K or V.
__device__ __forceinline__ int64_t key_row(const FlashAttentionParams& p, const cpu::KeyValue& t,
                                           const int32_t* pages, int32_t key) {
  if (!pages) return key * t.token;
  const int32_t page = p.page_shift >= 0 ? key >> p.page_shift : key / p.page_size;
  const int32_t slot = key - page * p.page_size;
  return pages[page] * t.page + slot * t.token;
}

// 8 elements as T, wherever they lie.
template <class T>
__device__ __forceinline__ uint4 load_elements(const T* from) {
  union {
    T v[8];
    uint4 all;
  } x;
  if (reinterpret_cast<uintptr_t>(from) % 16 == 0) return *reinterpret_cast<const uint4*>(from);
#pragma unroll
  for (int i = 0; i < 8; ++i) x.v[i] = from[i];
  return x.all;
}
template <class T>
__device__ __forceinline__ uint4 load_codes(const uint8_t* from, bool integers) {
  union {
    uint8_t v[8];
    uint2 all;
  } codes;
  if (reinterpret_cast<uintptr_t>(from) % 8 == 0)
    codes.all = *reinterpret_cast<const uint2*>(from);
  else
#pragma unroll
    for (int i = 0; i < 8; ++i) codes.v[i] = from[i];
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float x[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint8_t code = codes.v[2 * i + j];
      x[j] = integers ? static_cast<float>(static_cast<int8_t>(code)) : soft_from_e4m3(code);
    }
    w[i] = pack2<T>(x[0], x[1]);
  }
  return make_uint4(w[0], w[1], w[2], w[3]);
}

// Rows [first, first + kRows) to `to`; rows outside `some` and columns past head_dim are zero.
// row_offset(row): element offset of a row. kAny: any alignment, codes if bits == 8. stride: of
// rows that are evenly spaced, else 0.
template <class T, int kD, int kRows, bool kAny, class F>
__device__ __forceinline__ void load_tile(uint32_t to, const void* data, int32_t first, Range some,
                                          int32_t head_dim, DType type, int64_t stride,
                                          F row_offset) {
  constexpr int kChunks = kD / 8, kStep = kPortableThreads / kChunks;
  static_assert(kPortableThreads % kChunks == 0 && kRows % kStep == 0, "whole passes");
  const int c = threadIdx.x % kChunks;
  const bool column = 8 * c < head_dim;
  if constexpr (!kAny) {
    // Most tiles: nothing to test, one addition per row.
    if (stride && first >= some.begin && first + kRows <= some.end && head_dim == kD) {
      const int r = threadIdx.x / kChunks;
      const T* from = static_cast<const T*>(data) + row_offset(first + r) + 8 * c;
      const uint32_t at = to + chunk_at<kD>(r, c);
#pragma unroll
      for (int i = 0; i < kRows / kStep; ++i) {
        cp_async_16((at ^ (i * kStep & 7) << 4) + i * kStep * kD * 2, from, true);
        from += kStep * stride;
      }
      return;
    }
  }
  // Partly unrolled: these addresses must not crowd the accumulators out of the registers.
  if constexpr (!kAny) {
#pragma unroll 4
    for (int r = threadIdx.x / kChunks; r < kRows; r += kStep) {
      const int32_t row = first + r;
      const bool really = column && row >= some.begin && row < some.end;
      const int64_t offset = really ? row_offset(row) + 8 * c : 0;
      cp_async_16(to + chunk_at<kD>(r, c), static_cast<const T*>(data) + offset, really);
    }
  } else {
#pragma unroll 1
    for (int r = threadIdx.x / kChunks; r < kRows; r += kStep) {
      const int32_t row = first + r;
      uint4 x = make_uint4(0, 0, 0, 0);
      if (column && row >= some.begin && row < some.end) {
        const int64_t offset = row_offset(row) + 8 * c;
        x = dtype_size(type) == 1
                ? load_codes<T>(static_cast<const uint8_t*>(data) + offset, type == DType::i8)
                : load_elements(static_cast<const T*>(data) + offset);
      }
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to + chunk_at<kD>(r, c)),
                   "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                   : "memory");
    }
  }
}

// What every thread of a tile needs now and then.
struct Shared {
  Work w;
  Range keys;
  bool found;
  float slope, sink;
  int64_t q_base, k_base, v_base, out_base, lse_base;
  const int32_t* pages;

  __device__ __forceinline__ void set(const FlashAttentionParams& p, const Work& work, bool is_work,
                                      int32_t rows) {
    found = is_work;
    if (!is_work) return;
    w = work;
    keys = visible(p, w, w.row, rows);
    slope = alibi_slope(p, w);
    sink = sink_logit(p, w.head);
    pages = p.table ? p.table + w.batch * p.table_stride : nullptr;
    const int64_t batch = p.cu_q ? 0 : w.batch, start_q = w.start_q, start_k = w.start_k;
    const int64_t head = w.head, kv_head = head / p.group;
    q_base = batch * p.q_batch + start_q * p.q_token + head * p.q_head;
    k_base = (pages ? 0 : batch * p.k.page + start_k * p.k.token) + kv_head * p.k.head;
    v_base = (pages ? 0 : batch * p.v.page + start_k * p.v.token) + kv_head * p.v.head;
    out_base = batch * p.out_batch + start_q * p.out_token + head * p.out_head;
    lse_base = batch * p.lse_batch + start_q * p.lse_token + head * p.lse_head;
  }
};

static_assert(sizeof(Shared) <= kSharedBytes, "struct Shared has grown");

__device__ __forceinline__ int64_t scale_at(const FlashAttentionParams& p, const cpu::KeyValue& t,
                                            const Shared& at, int32_t key) {
  const int64_t head = at.w.head / p.group * t.scale_head;
  if (!t.scale_per_token) return head;
  if (!at.pages)
    return head + (p.cu_q ? 0 : at.w.batch) * t.scale_page +
           (int64_t{at.w.start_k} + key) * t.scale_token;
  const int32_t page = key / p.page_size;
  return head + at.pages[page] * t.scale_page + (key - page * p.page_size) * t.scale_token;
}

template <class T, int kD, int kRows, bool kAny>
__global__ void __launch_bounds__(kPortableThreads)
    flash_portable_kernel(const __grid_constant__ FlashAttentionParams p, const bool packed_out) {
  constexpr int kKeys = kPortableKeys;
  constexpr int kBlocks = kRows / 64;  // 16-row blocks of a warp
  constexpr int kScores = kKeys / 2;   // per thread and block
  extern __shared__ __align__(1024) char shared[];
  const uint32_t q_tile = shared_address(shared);
  const uint32_t k_tile = q_tile + kRows * kD * 2, v_tile = k_tile + kKeys * kD * 2;
  float* const key_scales = reinterpret_cast<float*>(shared + (kRows + 2 * kKeys) * kD * 2);
  float* const value_scales = key_scales + kKeys;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  // What the whole tile shares lies in shared memory: the accumulators need the registers.
  Shared& at = *reinterpret_cast<Shared*>(value_scales + kKeys);
  grid_wait();
  if (warp == 0) {
    Work w;
    bool found = true;
    if (p.cu_q)
      found = packed_work(p, blockIdx.x, kRows, w);
    else
      w = dense_work(p, blockIdx.x, kRows);
    if (lane == 0) at.set(p, w, found, kRows);
  }
  __syncthreads();
  if (!at.found) return;
  auto load_keys = [&](const cpu::KeyValue& t, int64_t base, uint32_t to, int32_t first,
                       float* scales) {
    const int32_t* const pages = at.pages;
    load_tile<T, kD, kKeys, kAny>(to, t.data, first, at.keys, p.head_dim, p.kv_dtype,
                                  pages ? 0 : t.token,
                                  [&](int32_t key) { return base + key_row(p, t, pages, key); });
    if (kAny && threadIdx.x < kKeys) {
      const int32_t key = first + threadIdx.x;
      float scale = 0.0f;
      if (key >= at.keys.begin && key < at.keys.end)
        scale = t.scale ? t.scale[scale_at(p, t, at, key)] : 1.0f;
      scales[threadIdx.x] = scale;
    }
  };

  int32_t tile = (at.keys.end - 1) / kKeys;
  const int32_t first_tile = at.keys.begin / kKeys;
  if (at.keys.begin < at.keys.end) {
    const int64_t base = at.q_base;
    load_tile<T, kD, kRows, kAny>(q_tile, p.q, at.w.row, {0, at.w.len_q}, p.head_dim, p.dtype, 0,
                                  [&](int32_t row) { return base + row * p.q_token; });
    load_keys(p.k, at.k_base, k_tile, tile * kKeys, key_scales);
    cp_async_commit();
  } else {
    tile = first_tile - 1;
  }
  grid_launch_dependents();

  float out[kBlocks][kD / 2];
  RowState state[kBlocks];
#pragma unroll
  for (int m = 0; m < kBlocks; ++m)
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) out[m][i] = 0.0f;
  const bool folded = folded_scale(p) && !kAny;
  const float factor = folded ? p.scale * kLog2e : 1.0f;
  // Row of element e < 2 of block m; e >= 2 is 8 further.
  auto row_of = [&](int m) { return at.w.row + 64 * m + 16 * warp + lane / 4; };

  // Addresses of this lane's rows for ldmatrix. Tiles are 1024-byte aligned and the next 16 columns
  // are chunk ^ 2, so that step k is address ^ 32 k.
  const uint32_t q_at = q_tile + chunk_at<kD>(16 * warp + lane % 16, lane / 16);
  const uint32_t k_at = k_tile + chunk_at<kD>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  const uint32_t v_at = v_tile + chunk_at<kD>(lane % 16, lane / 16);

  for (; tile >= first_tile; --tile) {
    const int32_t first = tile * kKeys;
    cp_async_wait<0>();
    __syncthreads();  // K is there, and nobody reads the last V any more
    load_keys(p.v, at.v_base, v_tile, first, value_scales);
    cp_async_commit();

    float s[kBlocks][kScores];
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
      for (int i = 0; i < kScores; ++i) s[m][i] = 0.0f;
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
      uint32_t a[kBlocks][4];
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) ldmatrix_x4(a[m], (q_at ^ 32 * k) + m * 64 * kD * 2);
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t b[4];  // keys 0-7: k low, k high; keys 8-15: k low, k high
        ldmatrix_x4(b, (k_at ^ 32 * k) + n * 16 * kD * 2);
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
          multiply<T>(s[m] + 8 * n, a[m], b[0], b[1]);
          multiply<T>(s[m] + 8 * n + 4, a[m], b[2], b[3]);
        }
      }
    }
    if constexpr (kAny) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        const float scale = key_scales[8 * (i / 4) + 2 * (lane % 4) + i % 2];
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) s[m][i] *= scale;
      }
    }
    const int32_t column = first + 2 * (lane % 4);
    if (!folded) {
      const int32_t shift = at.w.len_k - at.w.len_q;
#pragma unroll
      for (int m = 0; m < kBlocks; ++m)
        modify_scores(p, s[m], at.slope, column, row_of(m) + shift, row_of(m) + 8 + shift);
    }
    // Some row of the tile does not see all of these keys.
    const Range least = row_limits(p, at.w, at.w.row),
                most = row_limits(p, at.w, at.w.row + kRows - 1);
    if (first < most.begin || first + kKeys > least.end) {
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        const Range low = row_limits(p, at.w, row_of(m)), high = row_limits(p, at.w, row_of(m) + 8);
        if (first + kKeys > least.end) mask_right(s[m], column, low.end, high.end);
        if (first < most.begin) mask_left(s[m], column, low.begin, high.begin);
      }
    }
    // V is there, and nobody reads this K any more; where V comes with scales, these come first.
    auto meet = [] {
      cp_async_wait<0>();
      __syncthreads();
    };
    if constexpr (kAny) meet();
    uint32_t probabilities[kBlocks][kScores / 2];
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
      constexpr int kChains = portable_rows(kD, kAny) == 64 ? 2 : 1;  // whatever kRows: same bits
      float origin[2], keep[2];
      state[m].template raise<kChains>(s[m], factor, origin, keep);
      state[m].template exponents<kChains>(s[m], factor, origin, keep);
      if constexpr (kAny) {
#pragma unroll
        for (int i = 0; i < kScores; ++i)
          s[m][i] *= value_scales[8 * (i / 4) + 2 * (lane % 4) + i % 2];
      }
#pragma unroll
      for (int i = 0; i < kScores / 2; ++i)
        probabilities[m][i] = pack2<T>(s[m][2 * i], s[m][2 * i + 1]);
#pragma unroll
      for (int i = 0; i < kD / 2; ++i) out[m][i] *= keep[i % 4 / 2];
    }
    if constexpr (!kAny) meet();
    // Not earlier: the scores need the registers that its addresses take.
    if (tile > first_tile) load_keys(p.k, at.k_base, k_tile, first - kKeys, key_scales);
    cp_async_commit();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
#pragma unroll
      for (int n = 0; n < kD / 16; ++n) {
        uint32_t b[4];  // columns 0-7: keys low, keys high; columns 8-15: keys low, keys high
        ldmatrix_x4_trans(b, (v_at ^ 32 * n) + k * 16 * kD * 2);
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
          multiply<T>(out[m] + 8 * n, probabilities[m] + 4 * k, b[0], b[1]);
          multiply<T>(out[m] + 8 * n + 4, probabilities[m] + 4 * k, b[2], b[3]);
        }
      }
    }
  }

  T* const to = static_cast<T*>(p.out) + at.out_base;
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
    float weight[2], log_sum[2], total[2];
    state[m].totals(total);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      weight[r] = state[m].finish(r, total[r], factor, p, at.sink, log_sum[r]);
      const int32_t row = row_of(m) + 8 * r;
      if (p.lse && lane % 4 == 0 && row < at.w.len_q)
        p.lse[at.lse_base + row * p.lse_token] = log_sum[r];
    }
    store_rows<T, kD>(to, p.out_token, p.head_dim, packed_out, out[m], row_of(m), row_of(m) + 8,
                      at.w.len_q, weight[0], weight[1]);
  }
}

template <class T, int kD, int kRows, bool kAny>
int launch_portable_rows(const FlashAttentionParams& p, void* stream) {
  const int64_t tiles =
      p.cu_q ? p.tokens_q / kRows + p.batch : ceil_div(p.len_q, kRows) * int64_t{p.batch};
  if (tiles * p.heads_q > kMaxTiles) return cudaErrorInvalidConfiguration;
  return launch(flash_portable_kernel<T, kD, kRows, kAny>,
                dim3(static_cast<unsigned>(tiles * p.heads_q)), dim3(kPortableThreads),
                portable_shared_bytes(kD, kRows), stream, p,
                aligned16(p.out, {p.out_batch, p.out_token, p.out_head}));
}

template <class T, int kD, bool kAny>
int launch_portable(const FlashAttentionParams& p, void* stream) {
  if constexpr (kD == 64 && !kAny) {
    if (portable_short_tiles(tiles_of_64(p), device_facts().sms))
      return launch_portable_rows<T, 64, 64, false>(p, stream);
  }
  return launch_portable_rows<T, kD, portable_rows(kD, kAny), kAny>(p, stream);
}

}  // namespace fastinfer::cuda::flash
