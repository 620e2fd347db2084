// quantize_per_token: x [M, K] to int8 q [M, K] with one scale (and zero point) per row; the rule
// and the bits of csrc/cpu/quantize_row.h (common/quantize_row.cuh). A static scale needs no range.
//
// A row belongs to a group of threads (common/row_group.h). Aligned rows of at most 1024 * kPacks
// packs of 16 bytes (32768 elements of a 16-bit type) stay in registers between range and codes;
// any other row is walked pack by pack and read twice.
#include "quantize_rows.h"

#include "../common/quantize_row.cuh"

namespace fastinfer::cuda {
namespace {

constexpr int kPacks = 4;

struct QuantizeLaunch {
  cpu::QuantizeRowsParams p;
  int64_t rows;
  int row_threads, rows_per_block;
  bool in_registers, packs, code_packs;
};

template <class E>
__global__ void __launch_bounds__(kMaxRowThreads)
    quantize_rows_kernel(const __grid_constant__ QuantizeLaunch a) {
  constexpr int kSize = Pack<E>::kSize;
  __shared__ RowScratch<uint2> ranges;
  const cpu::QuantizeRowsParams& p = a.p;
  RowGroup group(a.row_threads);
  int64_t r = static_cast<int64_t>(blockIdx.x) * a.rows_per_block + group.row;
  const bool active = r < a.rows;
  r = active ? r : 0;
  const int k = static_cast<int>(p.k), step = a.row_threads * kSize;
  const int first = active ? group.thread * kSize : k;  // no work without a row
  grid_wait();
  const E* x = static_cast<const E*>(p.x) + r * p.x_stride;
  int8_t* q = p.q + r * p.q_stride;

  uint4 held[kPacks] = {};
  RowRange range;
  if (a.in_registers) {
#pragma unroll
    for (int n = 0; n < kPacks; ++n)
      if (first + n * step < k) held[n] = load_row_pack(x, first + n * step, k, true);
  }
  if (!p.static_scale) {
    float y[kSize];
    if (a.in_registers) {
#pragma unroll
      for (int n = 0; n < kPacks; ++n) {
        unpack<E>(y, held[n]);
        range.add(y);
      }
    } else {
      for (int i = first; i < k; i += step) {
        unpack<E>(y, load_row_pack(x, i, k, a.packs));
        range.add(y);
      }
    }
  }
  grid_launch_dependents();
  const RowCodes codes =
      p.static_scale ? static_codes(*p.static_scale)
                     : row_codes(reduce_range(group, range, !p.zeros, ranges), p.zeros != nullptr);
  if (active && group.thread == 0) {
    p.scale[r] = codes.scale;
    if (p.zeros) p.zeros[r] = codes.zero;
  }
  with_mode(codes.mode, [&](auto tag) {
    constexpr CodeMode kMode = decltype(tag)::mode;
    float y[kSize];
    if (a.in_registers) {
#pragma unroll
      for (int n = 0; n < kPacks; ++n) {
        if (first + n * step >= k) continue;
        unpack<E>(y, held[n]);
        codes.template store<kMode>(q, first + n * step, k, true, y);
      }
    } else {
      for (int i = first; i < k; i += step) {
        unpack<E>(y, load_row_pack(x, i, k, a.packs));
        codes.template store<kMode>(q, i, k, a.code_packs, y);
      }
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
    const RowLayout layout = row_layout(packs, rows <= device_facts().sms ? 1 : kPacks);
    QuantizeLaunch a{p, rows, layout.threads, layout.rows_per_block, false, false, false};
    const int64_t x_stride = rows > 1 ? p.x_stride : 0, q_stride = rows > 1 ? p.q_stride : 0;
    a.packs = packs_fit(p.x, p.k, sizeof(E), {x_stride});
    a.code_packs =
        reinterpret_cast<uintptr_t>(p.q) % kSize == 0 && p.k % kSize == 0 && q_stride % kSize == 0;
    a.in_registers = a.packs && a.code_packs && packs <= int64_t{layout.threads} * kPacks;
    const auto blocks = static_cast<unsigned>(ceil_div(rows, layout.rows_per_block));
    return launch(quantize_rows_kernel<E>, blocks, layout.threads * layout.rows_per_block, 0,
                  stream, a);
  });
}

}  // namespace fastinfer::cuda
