// dequantize_weight: see dequantize.h.
//
// A run is 8 neighbouring columns of one row: never more than one group, since group sizes are
// multiples of 8. CUDA layout: a block of 256 threads makes 64 x 64 tiles, a thread the same run of
// rows g and g + 8 of a strip, whose codes share the four words of a quad of lanes; a warp writes
// eight pieces of 128 bytes (16-bit out). Other runs read the rest of the words' sectors, through
// L1. CPU layout (not what any kernel here multiplies with): a thread per run.
//
// Codes become floats by way of 2^23 + code, which is exact and costs no conversion.
#include "dequantize.h"

#include "../common/launch.cuh"
#include "../common/vec.cuh"

namespace fastinfer::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTiles = 2;  // neighbours of 64 columns per block

struct Launch {
  DequantizePacked p;
  int64_t n_pad;
  int32_t steps;  // of qweight
  bool packs;     // out is written in 16-byte packs
};

// Values i and i + 1 of a vector, i even; f32, f16, bf16 or u8.
__device__ __forceinline__ float2 two_floats(DType type, const void* p, int64_t i) {
  if (type == DType::f16)
    return __half22float2(*reinterpret_cast<const __half2*>(static_cast<const __half*>(p) + i));
  if (type == DType::bf16)
    return __bfloat1622float2(
        *reinterpret_cast<const __nv_bfloat162*>(static_cast<const __nv_bfloat16*>(p) + i));
  if (type == DType::u8) {
    const uchar2 two = *reinterpret_cast<const uchar2*>(static_cast<const uint8_t*>(p) + i);
    return make_float2(two.x, two.y);
  }
  return *reinterpret_cast<const float2*>(static_cast<const float*>(p) + i);
}

constexpr float kMagic = 8388608.0f;  // 2^23: its last mantissa bits are a code
__device__ __forceinline__ float magic(uint32_t code) {
  return __uint_as_float(0x4B000000u | code);
}

// (q - z) s (+ zf) of one run; q: codes in magic form, z: zero point + kMagic.
struct Group {
  float s, z, zf;
  bool add;
};
__device__ __forceinline__ void scale_run(float (&v)[8], const Group& g) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    v[j] = __fmul_rn(v[j] - g.z, g.s);
    if (g.add) v[j] = __fadd_rn(v[j], g.zf);
  }
}

template <class E>
__device__ __forceinline__ void store_run(const Launch& a, int64_t row, int column,
                                          const float (&v)[8]) {
  const int k = static_cast<int>(a.p.layout.k);
  E* out = static_cast<E*>(a.p.out) + row * a.p.out_stride;
  if (a.packs && column + 8 <= k) {
    constexpr int kSize = Pack<E>::kSize;
#pragma unroll
    for (int i = 0; i < 8; i += kSize) {
      float part[kSize];
#pragma unroll
      for (int j = 0; j < kSize; ++j) part[j] = v[i + j];
      *reinterpret_cast<uint4*>(out + column + i) = pack_of<E>(part);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (column + i >= k) continue;
    const int64_t to = a.p.perm ? a.p.perm[column + i] : column + i;
    if (to >= 0 && to < k) out[to] = from_float<E>(v[i]);
  }
}

template <class E>
__global__ void __launch_bounds__(kThreads) from_cuda_layout(const __grid_constant__ Launch a) {
  const bool four = a.p.layout.bits == 4;
  const int run = static_cast<int>(threadIdx.x) % 8, pair = static_cast<int>(threadIdx.x) / 8;
  const int strip = pair / 8, g8 = pair % 8, step = run / 2, half = run % 2;
  const int first = static_cast<int>(blockIdx.y) * kTiles;  // tile
  const int tiles = min(kTiles, a.steps - first);
  const int word = (strip * 32 + g8 * 4) * 4 + step;
  grid_wait();
  const uint32_t* from =
      a.p.qweight + (static_cast<int64_t>(blockIdx.x) * a.steps + first) * (four ? 512 : 1024) +
      (four ? word : 2 * word + half);
  uint32_t words[kTiles][4];
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
    if (i < tiles)
#pragma unroll
      for (int t = 0; t < 4; ++t)
        words[i][t] = __ldg(from + (four ? i * 512 + 4 * t : i * 1024 + 8 * t));
  const auto columns = static_cast<uint32_t>(a.p.group_columns);
  const uint32_t column0 = static_cast<uint32_t>(first * 64 + run * 8);
  uint32_t group = column0 / columns, rest = column0 % columns;
  const int64_t slot0 = static_cast<int64_t>(blockIdx.x) * 64 + g8 * 8 + strip * 2;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 64 + strip * 16 + g8;
  const bool int_zeros = a.p.zeros && a.p.zero_dtype == DType::u8;
  const bool add = a.p.zeros && !int_zeros;
  const float middle = four ? 8.0f : 128.0f;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int column = static_cast<int>(column0) + 64 * i;
    if (i >= tiles || column >= a.p.layout.k) break;
    const int64_t slot = group * a.n_pad + slot0;
    const float2 s = two_floats(a.p.scale_dtype, a.p.scales, slot);
    float2 z = make_float2(middle, middle);
    if (a.p.zeros) z = two_floats(a.p.zero_dtype, a.p.zeros, slot);
    float v[2][8];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      // Register 2 half (row) and 2 half + 1 (row + 8): nibbles, or bytes of the word of the half.
      const uint32_t w = four ? words[i][t] >> 8 * half : words[i][t];
      const int next = four ? 4 : 8;
      const uint32_t mask = four ? 15 : 255;
      v[0][2 * t] = magic(w & mask);
      v[1][2 * t] = magic(w >> next & mask);
      v[0][2 * t + 1] = magic(w >> 16 & mask);
      v[1][2 * t + 1] = magic(w >> (16 + next) & mask);
    }
    const float z0 = (add ? middle : z.x) + kMagic, z1 = (add ? middle : z.y) + kMagic;
    scale_run(v[0], {s.x, z0, z.x, add});
    scale_run(v[1], {s.y, z1, z.y, add});
    if (row < a.p.layout.n) store_run<E>(a, row, column, v[0]);
    if (row + 8 < a.p.layout.n) store_run<E>(a, row + 8, column, v[1]);
    for (rest += 64; rest >= columns; rest -= columns) ++group;
  }
}

template <class E>
__global__ void __launch_bounds__(kThreads) from_cpu_layout(const __grid_constant__ Launch a) {
  const bool four = a.p.layout.bits == 4;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x / 8;
  const int run = static_cast<int>(blockIdx.y) * 8 + static_cast<int>(threadIdx.x) % 8;
  const int column = 8 * run;
  grid_wait();
  if (row >= a.p.layout.n || column >= a.p.layout.k) return;
  const uint32_t* from = a.p.qweight + row / 16 * a.steps * 16 + row % 16;
  const int word = four ? run : 2 * run;
  const uint32_t w0 = from[word * 16], w1 = four || word + 1 >= a.steps ? 0 : from[word * 16 + 16];
  const int64_t slot =
      static_cast<uint32_t>(column) / static_cast<uint32_t>(a.p.group_columns) * a.n_pad + row;
  const float middle = four ? 8.0f : 128.0f;
  Group g{static_cast<const float*>(a.p.scales)[slot], middle, 0.0f, false};
  if (a.p.zeros && a.p.zero_dtype == DType::u8) {
    g.z = static_cast<const uint8_t*>(a.p.zeros)[slot];
  } else if (a.p.zeros) {
    g.zf = static_cast<const float*>(a.p.zeros)[slot];
    g.add = true;
  }
  g.z += kMagic;
  float v[8];
#pragma unroll
  for (int i = 0; i < 8; ++i)
    v[i] = magic(four ? w0 >> 4 * i & 15 : (i < 4 ? w0 : w1) >> 8 * (i % 4) & 255);
  scale_run(v, g);
  store_run<E>(a, row, column, v);
}

}  // namespace

int dequantize_packed(const DequantizePacked& p, void* stream) {
  if (p.layout.n == 0 || p.layout.k == 0) return cudaSuccess;
  return with_float(p.out_dtype, [&](auto element) {
    using E = decltype(element);
    // A row may end inside a pack: packs then cover its whole 8-column runs only.
    const bool packs =
        packs_fit(p.out, 8, sizeof(E), {p.layout.n > 1 ? p.out_stride : 0}) && !p.perm;
    const Launch a{p, p.layout.n_pad(), static_cast<int32_t>(p.layout.steps()), packs};
    const auto y = [&](int64_t columns) {
      return static_cast<unsigned>(ceil_div(p.layout.k, columns));
    };
    if (p.layout.cuda)
      return launch(from_cuda_layout<E>,
                    dim3(static_cast<unsigned>(p.layout.blocks()), y(64 * kTiles)), kThreads, 0,
                    stream, a);
    return launch(from_cpu_layout<E>, dim3(static_cast<unsigned>(ceil_div(p.layout.n, 32)), y(64)),
                  kThreads, 0, stream, a);
  });
}

}  // namespace fastinfer::cuda
