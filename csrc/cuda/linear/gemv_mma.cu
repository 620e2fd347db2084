// Y[M, N] = X[M, K] W[N, K]^T + bias for up to eight tokens and 16-bit weights, on the tensor
// cores. As gemv.cu, whose FMAs of five tokens take more time than the weights do: a persistent CTA
// per multiprocessor takes eight neighbouring rows at a time, its 8 warps split the columns of a
// step of 1024, and a ring of cp.async stages runs across rows.
//
// W is operand B of mma.m16n8k16 (its eight rows are the eight columns), X is A: the tokens are
// rows 0 to 7 of it, rows 8 to 15 are zero. A warp copies the 128 columns of a step that it
// multiplies, of W and, in the first eight rows, of X as well: no barrier of the CTA stands before
// the first product, and X of 14336 columns comes while weights pass by. 16-byte packs of W lie at
// (pack ^ row), so that ldmatrix meets every bank once.
//
// At the end of eight rows the warps' sums meet in shared memory: two buffers, one barrier. The
// order of a sum is that of K, whatever the number of tokens.
//
// Weights are read before grid_wait(): they are older than the launch (launch.cuh).
#include <type_traits>

#include "../common/launch.cuh"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"
#include "../ptx/async_copy.cuh"
#include "../ptx/mma.cuh"
#include "gemv_mma.h"

namespace fastinfer::cuda {
namespace {

constexpr int kThreads = 32 * kGemvWarps;
constexpr int kRows = kGemvMmaRows, kWarpBytes = kGemvMmaStage / kGemvWarps;

struct Params : GemvParams {
  int stages, x_pitch, ring, sums;
};

// What a lane copies: of a step, pack lane % 16 of rows lane / 16 + 0, 2, 4, 6.
struct Loader {
  const Params& p;
  const char* from;  // of W
  const char* x_from;
  int64_t stride;  // of W, bytes
  uint32_t ring, x_to;
  int first, column, round, x_column, row;
  GemvRange rows;

  __device__ __forceinline__ Loader(const Params& params, uint32_t shared)
      : p(params), stride(params.w_stride * 2) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    row = lane / 16;
    const int pack = lane % 16;
    first = x_column = warp * 128 + pack * 8;
    ring = shared + p.ring + warp * kWarpBytes + row * 256 + (pack ^ row) * 16;
    x_to = shared + row * p.x_pitch + first * 2;
    x_from = static_cast<const char*>(p.x) + row * p.x_stride * 2 + first * 2;
    round = -1;
    next_rows();
  }
  __device__ __forceinline__ void next_rows() {
    rows =
        gemv_rows(kRows, p.n, static_cast<int>(gridDim.x), static_cast<int>(blockIdx.x), ++round);
    column = first;
    from = static_cast<const char*>(p.w) + (rows.begin + row) * stride + column * 2;
  }
  // Nothing is read of absent rows and columns; zeros stand for them.
  __device__ __forceinline__ void load_weights(int slot) {
    if (rows.begin >= rows.end) return;
    const uint32_t to = ring + slot * kGemvMmaStage;
    const int present = column < p.k ? rows.end - rows.begin : 0;
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) {
      const bool there = row + 2 * i < present;
      // (pack ^ row) of row + 2 i, as 2 i leaves the lowest bit alone
      cp_async_zero((to ^ (i * 32)) + i * 512, there ? from + 2 * i * stride : p.w, there ? 16 : 0);
    }
    column += kGemvMmaColumns, from += kGemvMmaColumns * 2;
    if (column - first == p.steps * kGemvMmaColumns) next_rows();
  }
  __device__ __forceinline__ void load_x() {
    if (x_column - first >= p.steps * kGemvMmaColumns) return;
#pragma unroll
    for (int i = 0; i < kGemvMmaTokens / 2; ++i) {
      if (row + 2 * i < p.m)
        cp_async_zero(x_to + 2 * i * p.x_pitch, x_column < p.k ? x_from + 4 * i * p.x_stride : p.x,
                      x_column < p.k ? 16 : 0);
    }
    x_column += kGemvMmaColumns, x_from += kGemvMmaColumns * 2, x_to += kGemvMmaColumns * 2;
  }
};

template <class E>
__global__ void __launch_bounds__(kThreads, 1) gemv_mma_kernel(const __grid_constant__ Params p) {
  constexpr bool kBf16 = std::is_same_v<E, __nv_bfloat16>;
  extern __shared__ __align__(128) unsigned char shared[];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const uint32_t base = shared_address(shared);

  grid_launch_dependents();

  Loader loader(p, base);
  // x first: its loads would wait behind those of the weights. Under programmatic launch the
  // weights first, as they may be read while the kernel in front still writes x.
  const int ahead = p.stages - 1;
  if (p.weights_first) {
#pragma unroll 1
    for (int i = 0; i < ahead; ++i) loader.load_weights(i), cp_async_commit();
  }
  grid_wait();
#pragma unroll 1
  for (int i = 0; i < ahead; ++i) {
    loader.load_x();
    if (!p.weights_first) loader.load_weights(i);
    cp_async_commit();
  }

  float* const all_sums = reinterpret_cast<float*>(shared + p.sums);
  // Rows of ldmatrix: token or row of W lane % 8, columns 8 (lane / 8) of 32. Absent tokens read
  // the first one: a row of A meets its own row of the result only.
  const int line = lane % 8, part = lane / 8;
  const uint32_t x_lane = base + (line < p.m ? line * p.x_pitch : 0) + (warp * 128 + part * 8) * 2;
  const uint32_t w_lane = base + p.ring + warp * kWarpBytes + line * 256;
  int slot = 0, previous = p.stages - 1, buffer = 0;
  const bool deep = p.stages == kGemvMmaDeep;
#pragma unroll 1
  for (int round = 0;; ++round) {
    const GemvRange rows =
        gemv_rows(kRows, p.n, static_cast<int>(gridDim.x), static_cast<int>(blockIdx.x), round);
    if (rows.begin >= rows.end) break;
    float acc[2][4] = {};
    uint32_t x_at = x_lane;
#pragma unroll 1
    for (int step = 0; step < p.steps; ++step) {
      if (deep)
        cp_async_wait<kGemvMmaDeep - 2>();
      else
        cp_async_wait<kGemvMmaShallow - 2>();
      __syncwarp();  // what the others copied; and all have read the slot before
      loader.load_weights(previous);
      loader.load_x();
      cp_async_commit();
      const uint32_t w_at = w_lane + slot * kGemvMmaStage;
      uint32_t w[4][4], x[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ldmatrix_x4(w[i], w_at + ((4 * i + part) ^ line) * 16);
        ldmatrix_x4(x[i], x_at + i * 64);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t a[4] = {x[i][2 * h], 0, x[i][2 * h + 1], 0};
          mma_16816<kBf16>(acc[h], a, w[i][2 * h], w[i][2 * h + 1]);
        }
      x_at += kGemvMmaColumns * 2;
      previous = slot;
      slot = slot + 1 == p.stages ? 0 : slot + 1;
    }
    // [warp][token][row]
    float* const mine = all_sums + buffer * (kGemvWarps * kGemvMmaTokens * kRows);
    if (lane / 4 < p.m)
      *reinterpret_cast<float2*>(mine + warp * (kGemvMmaTokens * kRows) + 2 * lane) =
          make_float2(acc[0][0] + acc[1][0], acc[0][1] + acc[1][1]);
    __syncthreads();  // who writes this buffer again has passed the next one
    if (thread < p.m * kRows) {
      const int token = thread / kRows, n = rows.begin + thread % kRows;
      float v = mine[thread];
#pragma unroll
      for (int i = 1; i < kGemvWarps; ++i) v += mine[i * (kGemvMmaTokens * kRows) + thread];
      if (n < rows.end) {
        if (p.bias) v = __fadd_rn(v, to_float(static_cast<const E*>(p.bias)[n]));
        static_cast<E*>(p.out)[token * p.out_stride + n] = from_float<E>(v);
      }
    }
    buffer ^= 1;
  }
}

}  // namespace

bool gemv_mma_fits(const DenseLinear& p) {
  return (p.dtype == DType::bf16 || p.dtype == DType::f16) && p.n > 0 && p.n <= INT32_MAX / 2 &&
         p.k % 8 == 0 && packs_fit(p.w, p.k, 2, {p.w_stride}) &&
         packs_fit(p.x, p.k, 2, {p.x_stride}) &&
         gemv_mma_shared(p.m, p.k, device_facts().shared_bytes).stages > 0;
}

int gemv_mma_dense(const DenseLinear& p, void* stream) {
  const DeviceFacts& facts = device_facts();
  // Under programmatic launch one multiprocessor is left to the small kernels between linears.
  const int most = facts.sms - (programmatic_launch() && facts.sms > 1 ? 1 : 0);
  const GemvMmaShared at = gemv_mma_shared(p.m, p.k, facts.shared_bytes);
  const int64_t strips = ceil_div(p.n, kRows);
  const Params s{gemv_params(p, ceil_div(p.k, kGemvMmaColumns), programmatic_launch()), at.stages,
                 at.x_pitch, at.ring, at.sums};
  const dim3 ctas(static_cast<unsigned>(strips < most ? strips : most));
  return p.dtype == DType::bf16
             ? launch(gemv_mma_kernel<__nv_bfloat16>, ctas, dim3(kThreads), at.bytes, stream, s)
             : launch(gemv_mma_kernel<__half>, ctas, dim3(kThreads), at.bytes, stream, s);
}

}  // namespace fastinfer::cuda
