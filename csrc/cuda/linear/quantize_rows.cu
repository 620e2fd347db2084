// quantize_per_token: x [M, K] to int8 q [M, K] with one scale (and zero point) per row; the rule
// and the bits of csrc/cpu/quantize_row.h (common/quantize_row.cuh). A static scale needs no range.
//
// A row belongs to a group of threads (common/row_group.h). Aligned rows of at most 4096
// packs of 16 bytes (32768 elements of a 16-bit type) stay in registers between range and codes;
// any other row is walked pack by pack and read twice. The range of 16-bit elements is taken in
// pairs, before they become fp32.
#include "quantize_rows.h"

#include "../common/quantize_row.cuh"

namespace fastinfer::cuda {
namespace {

constexpr int kManyPacks = 4;  // of a thread where there are many rows

struct QuantizeLaunch {
  const void* x;
  int8_t* q;
  float* scale;
  int32_t* zeros;
  const float* static_scale;
  int64_t x_stride, q_stride, rows;
  int32_t k, row_threads;
  bool packs, code_packs;
};

// Range of packs.
template <class E>
struct PackRange {
  RowRange range;
  __device__ __forceinline__ void add(const uint4& pack, bool symmetric) {
    float y[Pack<E>::kSize];
    unpack<E>(y, pack);
    range.add(y, symmetric);
  }
  __device__ __forceinline__ RowRange all() const { return range; }
};

template <class E>
struct HalfRange {
  using Pair = typename PairOf<E>::Type;
  uint32_t top = 0, bottom = 0;
  __device__ __forceinline__ void add(const uint4& pack, bool symmetric) {
    const uint32_t word[4] = {pack.x, pack.y, pack.z, pack.w};
    Pair high = as_pair<E>(top), low = as_pair<E>(bottom);
    if (symmetric) {
#pragma unroll
      for (int w = 0; w < 4; ++w) high = __hmax2_nan(high, __habs2(as_pair<E>(word[w])));
    } else {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        high = __hmax2_nan(high, as_pair<E>(word[w]));
        low = __hmin2_nan(low, as_pair<E>(word[w]));
      }
    }
    top = as_word(high), bottom = as_word(low);
  }
  __device__ __forceinline__ RowRange all() const {
    const Pair high = as_pair<E>(top), low = as_pair<E>(bottom);
    return {max_or_nan(to_float(high.x), to_float(high.y)),
            min_or_nan(to_float(low.x), to_float(low.y))};
  }
};
template <>
struct PackRange<__half> : HalfRange<__half> {};
template <>
struct PackRange<__nv_bfloat16> : HalfRange<__nv_bfloat16> {};

template <class E>
__device__ __forceinline__ RowCodes codes_of_row(const QuantizeLaunch& a, const RowGroup& group,
                                                 const RowRange& range, int64_t r, bool owner,
                                                 uint2 (&scratch)[32]) {
  const RowCodes codes =
      a.static_scale ? static_codes(*a.static_scale)
                     : row_codes(reduce_range(group, range, !a.zeros, scratch), a.zeros != nullptr);
  if (owner) {
    a.scale[r] = codes.scale;
    if (a.zeros) a.zeros[r] = codes.zero;
  }
  return codes;
}

// kPacks: 1 where rows are few (short code, many threads), else kManyPacks.
template <class E, int kPacks>
__global__ void __launch_bounds__(kMaxRowThreads)
    quantize_held_kernel(const __grid_constant__ QuantizeLaunch a) {
  constexpr int kSize = Pack<E>::kSize;
  __shared__ uint2 scratch[32];
  RowGroup group(a.row_threads);
  const int64_t r = group.global_row();
  const bool active = r < a.rows, symmetric = !a.zeros;
  const int packs = active ? a.k / kSize : 0;
  grid_launch_dependents();
  grid_wait();
  const uint4* x = reinterpret_cast<const uint4*>(static_cast<const E*>(a.x) + r * a.x_stride);
  uint4 held[kPacks] = {};
#pragma unroll
  for (int n = 0; n < kPacks; ++n) {
    const int at = group.thread + n * a.row_threads;
    if (at < packs) held[n] = x[at];
  }
  PackRange<E> range;
  if (!a.static_scale) {
#pragma unroll
    for (int n = 0; n < kPacks; ++n) range.add(held[n], symmetric);
  }
  const RowCodes codes =
      codes_of_row<E>(a, group, range.all(), r, active && group.thread == 0, scratch);
  int8_t* q = a.q + r * a.q_stride;
  with_mode(codes.mode, [&](auto tag) {
#pragma unroll
    for (int n = 0; n < kPacks; ++n) {
      const int at = group.thread + n * a.row_threads;
      if (at >= packs) break;
      float y[kSize];
      unpack<E>(y, held[n]);
      codes.template store<decltype(tag)::mode>(q, at * kSize, a.k, true, y);
    }
  });
}

template <class E>
__global__ void __launch_bounds__(kMaxRowThreads)
    quantize_any_kernel(const __grid_constant__ QuantizeLaunch a) {
  constexpr int kSize = Pack<E>::kSize;
  __shared__ uint2 scratch[32];
  RowGroup group(a.row_threads);
  int64_t r = group.global_row();
  const bool active = r < a.rows, symmetric = !a.zeros;
  r = active ? r : 0;
  const int step = a.row_threads * kSize;
  const int first = active ? group.thread * kSize : a.k;  // no work without a row
  grid_launch_dependents();
  grid_wait();
  const E* x = static_cast<const E*>(a.x) + r * a.x_stride;
  PackRange<E> range;
  if (!a.static_scale)
    for (int i = first; i < a.k; i += step) range.add(load_pack(x, i, a.k, a.packs), symmetric);
  const RowCodes codes =
      codes_of_row<E>(a, group, range.all(), r, active && group.thread == 0, scratch);
  int8_t* q = a.q + r * a.q_stride;
  with_mode(codes.mode, [&](auto tag) {
    for (int i = first; i < a.k; i += step) {
      float y[kSize];
      unpack<E>(y, load_pack(x, i, a.k, a.packs));
      codes.template store<decltype(tag)::mode>(q, i, a.k, a.code_packs, y);
    }
  });
}

}  // namespace

int quantize_rows(const cpu::QuantizeRowsParams& p, int64_t rows, void* stream) {
  return with_float(p.dtype, [&](auto element) {
    using E = decltype(element);
    constexpr int kSize = Pack<E>::kSize;
    const int64_t packs = ceil_div(p.k, kSize);
    // A range does not depend on its order, so few rows may have more threads.
    const bool few = sizeof(E) == 2 && packs <= kMaxRowThreads && rows <= device_facts().sms;
    const RowLayout layout = row_layout(packs, few ? 1 : kManyPacks);
    const int64_t x_stride = rows > 1 ? p.x_stride : 0, q_stride = rows > 1 ? p.q_stride : 0;
    QuantizeLaunch a{};
    a.x = p.x, a.q = p.q, a.scale = p.scale, a.zeros = p.zeros, a.static_scale = p.static_scale;
    a.x_stride = x_stride, a.q_stride = q_stride, a.rows = rows;
    a.k = static_cast<int32_t>(p.k), a.row_threads = layout.threads;
    a.packs = packs_fit(p.x, p.k, sizeof(E), {x_stride});
    a.code_packs =
        reinterpret_cast<uintptr_t>(p.q) % kSize == 0 && p.k % kSize == 0 && q_stride % kSize == 0;
    const auto blocks = static_cast<unsigned>(ceil_div(rows, layout.rows_per_block));
    const int block = layout.threads * layout.rows_per_block;
    if (!a.packs || !a.code_packs || packs > int64_t{layout.threads} * kManyPacks)
      return launch(quantize_any_kernel<E>, blocks, block, 0, stream, a);
    if constexpr (sizeof(E) == 2)
      if (few) return launch(quantize_held_kernel<E, 1>, blocks, block, 0, stream, a);
    return launch(quantize_held_kernel<E, kManyPacks>, blocks, block, 0, stream, a);
  });
}

}  // namespace fastinfer::cuda
