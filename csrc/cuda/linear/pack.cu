// pack_weight: see pack.h. One kernel for the words, a thread each, and one for scales and zeros.
//
// Words: a block makes the 64 x 64 codes of one block of the CUDA layout (or the same area of the
// CPU layout) from a copy in shared memory, read row by row with padding filled in: past the last
// row the middle code, past the last column the zero point of the last group.
#include "pack.h"

#include "../common/launch.cuh"
#include "../common/vec.cuh"

namespace fastinfer::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPitch = 68;  // bytes per row in shared memory: neighbouring rows in other banks

__device__ __forceinline__ uint8_t padded_code(const PackWeight& p, int64_t row, int64_t column) {
  const int middle = 1 << (p.layout.bits - 1);
  if (row >= p.layout.n) return static_cast<uint8_t>(middle);
  if (column < p.layout.k) return p.codes[row * p.codes_stride + column];
  if (!p.zeros || p.zero_dtype != DType::u8) return static_cast<uint8_t>(middle);
  const int64_t group = column / p.group_columns;
  return static_cast<const uint8_t*>(
      p.zeros)[row * p.groups + (group < p.groups ? group : p.groups - 1)];
}

__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackWeight p) {
  __shared__ uint8_t codes[64 * kPitch];
  const PackedLayout& layout = p.layout;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * 64;
  const int64_t column0 = static_cast<int64_t>(blockIdx.y) * 64;
  grid_wait();
#pragma unroll
  for (int i = 0; i < 64 * 64 / kThreads; ++i) {
    const int at = i * kThreads + static_cast<int>(threadIdx.x), r = at / 64, c = at % 64;
    codes[r * kPitch + c] = padded_code(p, row0 + r, column0 + c);
  }
  __syncthreads();
  const bool four = layout.bits == 4;
  const int words = four ? 512 : 1024;
  for (int at = threadIdx.x; at < words; at += kThreads) {
    uint32_t word = 0;
    if (layout.cuda) {
      // at = ((strip * 32 + lane) * 4 + step) * (1 or 2) + h
      const int h = four ? 0 : at % 2, place = four ? at : at / 2;
      const int step = place % 4, lane = place / 4 % 32, strip = place / 128;
      const uint8_t* first = codes + (strip * 16 + lane / 4) * kPitch + step * 16 + lane % 4 * 2;
      for (int i = 0; i < (four ? 4 : 2); ++i) {
        const int a = 2 * h + i;  // register
        const uint8_t* pair = first + a % 2 * 8 * kPitch + a / 2 * 8;
        word |= four ? (pair[0] & 15u) << 4 * a | (pair[1] & 15u) << (4 * a + 16)
                     : uint32_t{pair[0]} << 8 * i | uint32_t{pair[1]} << (8 * i + 16);
      }
      p.qweight[(blockIdx.x * layout.steps() + blockIdx.y) * words + at] = word;
    } else {
      // 16 channels side by side: at = (step * 4 + block of 16 rows) * 16 + channel
      const int per_word = four ? 8 : 4, r = at % 64, step = at / 64;
      const uint8_t* run = codes + r * kPitch + step * per_word;
      for (int i = 0; i < per_word; ++i)
        word |= four ? (run[i] & 15u) << 4 * i : uint32_t{run[i]} << 8 * i;
      const int64_t block = row0 / 16 + r / 16, to = column0 / per_word + step;
      if (block < layout.blocks() && to < layout.steps())
        p.qweight[(block * layout.steps() + to) * 16 + r % 16] = word;
    }
  }
}

// One value of scales or floating zeros.
__device__ __forceinline__ void pack_float(const void* from, DType type, int64_t i, void* to,
                                           DType to_type, int64_t slot, bool inside) {
  float v = 0.0f;
  if (inside) {
    if (type == DType::f16)
      v = __half2float(static_cast<const __half*>(from)[i]);
    else if (type == DType::bf16)
      v = __bfloat162float(static_cast<const __nv_bfloat16*>(from)[i]);
    else
      v = static_cast<const float*>(from)[i];
  }
  if (to_type == DType::f16)
    static_cast<__half*>(to)[slot] = from_float<__half>(v);
  else if (to_type == DType::bf16)
    static_cast<__nv_bfloat16*>(to)[slot] = from_float<__nv_bfloat16>(v);
  else
    static_cast<float*>(to)[slot] = v;
}

__global__ void __launch_bounds__(kThreads)
    pack_scales_kernel(const __grid_constant__ PackWeight p) {
  const PackedLayout& layout = p.layout;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t n_pad = layout.n_pad();
  grid_wait();
  if (at >= n_pad * p.groups) return;
  const int64_t group = at % p.groups, row = at / p.groups;
  const int64_t slot = layout.scale(group, row), from = row * p.groups + group;
  const bool inside = row < layout.n;
  pack_float(p.scales, p.scale_dtype, from, p.packed_scales, p.packed_scale_dtype, slot, inside);
  if (!p.zeros) return;
  if (p.zero_dtype == DType::u8)
    static_cast<uint8_t*>(p.packed_zeros)[slot] =
        inside ? static_cast<const uint8_t*>(p.zeros)[from]
               : static_cast<uint8_t>(1 << (layout.bits - 1));
  else
    pack_float(p.zeros, p.zero_dtype, from, p.packed_zeros, p.packed_zero_dtype, slot, inside);
}

}  // namespace

int pack_weight(const PackWeight& p, void* stream) {
  if (p.layout.n == 0 || p.layout.k == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.layout.n, 64)),
                  static_cast<unsigned>(ceil_div(p.layout.k, 64)));
  const int error = launch(pack_kernel, grid, kThreads, 0, stream, p);
  if (error != cudaSuccess) return error;
  const auto blocks = static_cast<unsigned>(ceil_div(p.layout.n_pad() * p.groups, kThreads));
  return launch(pack_scales_kernel, blocks, kThreads, 0, stream, p);
}

}  // namespace fastinfer::cuda
