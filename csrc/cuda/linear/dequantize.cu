// dequantize_weight: see dequantize.h.
//
// A thread makes runs of 8 neighbouring columns of one row: never more than one group, since group
// sizes are multiples of 8. A block of 256 threads covers 32 rows x 64 columns at a time, so a warp
// writes four pieces of 128 bytes (16-bit out). The codes of a run lie in four words of one quad of
// lanes (CUDA layout) or in one or two words (CPU layout); other rows and runs of the same block
// read the rest of their sectors, through L1.
#include "dequantize.h"

#include "../common/launch.cuh"
#include "../common/vec.cuh"

namespace fastinfer::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 32;  // of a block at a time
constexpr int kTiles = 4;  // of 64 columns per block

struct Launch {
  DequantizePacked p;
  int64_t steps;  // of qweight
  int64_t n_pad;
  bool packs;  // out is written in 16-byte packs
};

__device__ __forceinline__ float float_at(DType type, const void* p, int64_t i) {
  if (type == DType::f16) return __half2float(static_cast<const __half*>(p)[i]);
  if (type == DType::bf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
  return static_cast<const float*>(p)[i];
}

// The words that hold columns [8 run, 8 run + 8) of a row. CUDA layout: one per pair of columns;
// CPU layout: one (4 bit) or two.
__device__ __forceinline__ void load_words(const Launch& a, int64_t row, int64_t run,
                                           uint32_t (&w)[4]) {
  const bool four = a.p.layout.bits == 4;
  if (a.p.layout.cuda) {
    const int strip = static_cast<int>(row / 16 % 4), g8 = static_cast<int>(row % 8);
    const int step = static_cast<int>(run / 2 % 4), half = static_cast<int>(run % 2);
    const int64_t tile = row / 64 * a.steps + run / 8;
    const int word = (strip * 32 + g8 * 4) * 4 + step;
    const uint32_t* from = a.p.qweight + tile * (four ? 512 : 1024);
#pragma unroll
    for (int t = 0; t < 4; ++t) w[t] = from[four ? word + 4 * t : 2 * (word + 4 * t) + half];
  } else {
    const int64_t block = row / 16 * a.steps;
    const uint32_t* from = a.p.qweight + row % 16;
    w[0] = from[(block + (four ? run : 2 * run)) * 16];
    w[1] = four || 2 * run + 1 >= a.steps ? 0 : from[(block + 2 * run + 1) * 16];
  }
}

__device__ __forceinline__ void codes_of(const Launch& a, int64_t row, int64_t run,
                                         const uint32_t (&w)[4], float (&q)[8]) {
  const bool four = a.p.layout.bits == 4;
  const uint32_t mask = four ? 15 : 255;
  if (a.p.layout.cuda) {
    const int upper = static_cast<int>(row / 8 % 2), half = static_cast<int>(run % 2);
    const int shift = four ? 4 * (upper + 2 * half) : 8 * upper;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      q[2 * t] = static_cast<float>(w[t] >> shift & mask);
      q[2 * t + 1] = static_cast<float>(w[t] >> (shift + 16) & mask);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      q[i] = static_cast<float>((four ? w[0] >> 4 * i : w[i / 4] >> 8 * (i % 4)) & mask);
  }
}

template <class E>
__device__ __forceinline__ void store_run(const Launch& a, int64_t row, int64_t column,
                                          const float (&v)[8]) {
  E* out = static_cast<E*>(a.p.out) + row * a.p.out_stride;
  if (a.p.perm) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (column + i >= a.p.layout.k) continue;
      const int64_t to = a.p.perm[column + i];
      if (to >= 0 && to < a.p.layout.k) out[to] = from_float<E>(v[i]);
    }
  } else if (a.packs && column + 8 <= a.p.layout.k) {
    constexpr int kSize = Pack<E>::kSize;
#pragma unroll
    for (int i = 0; i < 8; i += kSize) {
      float part[kSize];
#pragma unroll
      for (int j = 0; j < kSize; ++j) part[j] = v[i + j];
      *reinterpret_cast<uint4*>(out + column + i) = pack_of<E>(part);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (column + i < a.p.layout.k) out[column + i] = from_float<E>(v[i]);
  }
}

template <class E>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const __grid_constant__ Launch a) {
  const PackedLayout& layout = a.p.layout;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / 8;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kTiles * 8 + threadIdx.x % 8;
  grid_wait();
  if (row >= layout.n) return;
  uint32_t words[kTiles][4];
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
    if ((first + 8 * i) * 8 < layout.k) load_words(a, row, first + 8 * i, words[i]);
  const float middle = layout.bits == 4 ? 8.0f : 128.0f;
  const bool int_zeros = a.p.zeros && a.p.zero_dtype == DType::u8;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int64_t run = first + 8 * i, column = run * 8;
    if (column >= layout.k) return;
    const int64_t group = column < a.p.group_columns ? 0
                                                     : static_cast<uint32_t>(column) /
                                                           static_cast<uint32_t>(a.p.group_columns);
    const int64_t slot = layout.scale(group, row);
    const float s = float_at(a.p.scale_dtype, a.p.scales, slot);
    const float z =
        int_zeros ? static_cast<float>(static_cast<const uint8_t*>(a.p.zeros)[slot]) : middle;
    float v[8];
    codes_of(a, row, run, words[i], v);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = __fmul_rn(v[j] - z, s);
    if (a.p.zeros && !int_zeros) {
      const float zf = float_at(a.p.zero_dtype, a.p.zeros, slot);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = __fadd_rn(v[j], zf);
    }
    store_run<E>(a, row, column, v);
  }
}

}  // namespace

int dequantize_packed(const DequantizePacked& p, void* stream) {
  if (p.layout.n == 0 || p.layout.k == 0) return cudaSuccess;
  return with_float(p.out_dtype, [&](auto element) {
    using E = decltype(element);
    const int64_t columns = ceil_div(p.layout.k, 64);
    const dim3 grid(static_cast<unsigned>(ceil_div(p.layout.n, kRows)),
                    static_cast<unsigned>(ceil_div(columns, kTiles)));
    // A row may end inside a pack: packs then cover its whole 8-column runs only.
    const bool packs =
        packs_fit(p.out, 8, sizeof(E), {p.layout.n > 1 ? p.out_stride : 0}) && !p.perm;
    const Launch a{p, p.layout.steps(), p.layout.n_pad(), packs};
    return launch(dequantize_kernel<E>, grid, kThreads, 0, stream, a);
  });
}

}  // namespace fastinfer::cuda
