// w8a8_linear by mma.sync: tiles of 128 tokens x 128 channels, K in steps of 64; runs everywhere
// and takes rows of any alignment.
//
// 8 warps of 64 x 32 outputs each. A ring of kStages stages in shared memory, filled by 16-byte
// cp.async (rows that are not aligned: by byte loads and ordinary stores); a row's four 16-byte
// pieces are swizzled by row / 2 so that ldmatrix finds eight rows in different banks. ldmatrix on
// 16-bit elements hands out exactly the int8 fragments of m16n8k32.
#include "../common/launch.cuh"
#include "../ptx/async_copy.cuh"
#include "../ptx/mma.cuh"
#include "w8a8.h"
#include "w8a8_finish.cuh"
#include "w8a8_mma.cuh"

namespace fastinfer::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 128, kStep = 64, kStages = 4;
constexpr int kMatrixBytes = kTile * kStep, kStageBytes = 2 * kMatrixBytes;

struct Launch {
  cpu::Int8Params p;
  bool x_aligned, w_aligned;  // rows at multiples of 16 bytes
  bool pairs;                 // out is written two neighbours at a time
};

__device__ __forceinline__ uint32_t piece_at(int row, int piece) {
  return static_cast<uint32_t>(row * kStep + ((piece ^ row / 2) & 3) * 16);
}

// Rows [first, first + 128) of a matrix, columns [k, k + 64), to shared memory; zeros outside.
__device__ __forceinline__ void load_tile(uint8_t* to, const int8_t* data, int64_t stride,
                                          int64_t first, int64_t rows, int k, int count,
                                          bool aligned) {
#pragma unroll
  for (int i = 0; i < kTile * 4 / kThreads; ++i) {
    const int at = i * kThreads + static_cast<int>(threadIdx.x), r = at / 4, piece = at % 4;
    const bool inside = first + r < rows;
    const int8_t* row = data + (inside ? first + r : 0) * stride;
    const int column = k + 16 * piece;
    uint8_t* slot = to + piece_at(r, piece);
    if (aligned && (!inside || column + 16 <= count || column >= count)) {
      const bool valid = inside && column < count;
      cp_async_16(shared_address(slot), valid ? row + column : data, valid);
    } else {
      *reinterpret_cast<uint4*>(slot) = load_16<false>(row, column, inside ? count : 0, aligned);
    }
  }
}

__device__ __forceinline__ void multiply(const uint8_t* stage, int32_t (&d)[4][4][4], int warp_m,
                                         int warp_n) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const uint32_t x = shared_address(stage), w = x + kMatrixBytes;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t a[4][4], b[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i)  // matrices: rows 0-7, 8-15, then the same of the next 16 bytes
      ldmatrix_x4(a[i], x + piece_at(warp_m * 64 + i * 16 + lane % 16, half * 2 + lane / 16));
#pragma unroll
    for (int j = 0; j < 2; ++j)
      ldmatrix_x4(b[j], w + piece_at(warp_n * 32 + j * 16 + lane % 16, half * 2 + lane / 16));
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        mma_s8(d[i][j], a[i][0], a[i][1], a[i][2], a[i][3], b[j / 2][j % 2], b[j / 2][2 + j % 2]);
  }
}

__global__ void __launch_bounds__(kThreads) tiles_kernel(const __grid_constant__ Launch a) {
  extern __shared__ __align__(128) uint8_t ring[];
  const cpu::Int8Params& p = a.p;
  const int64_t m0 = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t n0 = static_cast<int64_t>(blockIdx.y) * kTile;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int warp_m = warp % 2, warp_n = warp / 2;
  const int k = static_cast<int>(p.k), steps = (k + kStep - 1) / kStep;
  int32_t d[4][4][4] = {};
  grid_wait();
  const auto load = [&](int step) {
    if (step < steps) {
      uint8_t* stage = ring + step % kStages * kStageBytes;
      load_tile(stage, p.x, p.x_stride, m0, p.m, step * kStep, k, a.x_aligned);
      load_tile(stage + kMatrixBytes, p.weight, p.weight_stride, n0, p.n, step * kStep, k,
                a.w_aligned);
    }
    cp_async_commit();
  };
  for (int s = 0; s < kStages - 1; ++s) load(s);
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    load(step + kStages - 1);  // into the stage that was read before the barrier
    multiply(ring + step % kStages * kStageBytes, d, warp_m, warp_n);
  }
  grid_launch_dependents();
  const DType type = p.out.dtype;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t m = m0 + warp_m * 64 + i * 16 + h * 8 + lane / 4;
      if (m >= p.m) continue;
      const float x_scale = p.x_scale[m];
      const int32_t zero = p.x_zeros ? p.x_zeros[m] : 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t n = n0 + warp_n * 32 + j * 8 + lane % 4 * 2;
        float v[2] = {};
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (n + e < p.n)
            v[e] = w8a8_value(d[i][j][2 * h + e], zero, p.x_zeros ? p.weight_sum[n + e] : 0,
                              x_scale, p.weight_scale[n + e], p.out.bias != nullptr,
                              p.out.bias ? float_at(type, p.out.bias, n + e) : 0.0f);
        const int64_t to = m * p.out.stride + n;
        if (a.pairs && n + 1 < p.n) {
          if (type == DType::f32)
            *reinterpret_cast<float2*>(static_cast<float*>(p.out.data) + to) =
                make_float2(v[0], v[1]);
          else
            *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.out.data) + to) =
                pack_pair(type, v[0], v[1]);
        } else {
          if (n < p.n) store_float(type, p.out.data, to, v[0]);
          if (n + 1 < p.n) store_float(type, p.out.data, to + 1, v[1]);
        }
      }
    }
}

}  // namespace

int w8a8_tiles(const cpu::Int8Params& p, void* stream) {
  const int64_t pair = 2 * dtype_size(p.out.dtype), stride = p.m > 1 ? p.out.stride : 0;
  const Launch a{p, rows_aligned(p.x, p.m, p.x_stride),
                 rows_aligned(p.weight, p.n, p.weight_stride),
                 reinterpret_cast<uintptr_t>(p.out.data) % pair == 0 && stride % 2 == 0};
  const dim3 grid(static_cast<unsigned>(ceil_div(p.m, kTile)),
                  static_cast<unsigned>(ceil_div(p.n, kTile)));
  return launch(tiles_kernel, grid, kThreads, kStages * kStageBytes, stream, a);
}

}  // namespace fastinfer::cuda
