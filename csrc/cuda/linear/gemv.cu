// Y[M, N] = X[M, K] W[N, K]^T + bias for one to five tokens and 16-bit weights: plain fp32 FMAs, no
// tensor cores; the weights pass once, at memory speed.
//
// A persistent CTA per multiprocessor takes rows, eight neighbours at a time. Its 8 warps split the
// columns: in a step of 2048 columns, lane l of warp w owns the 8 at 256 w + 8 l, so that every
// load of a warp is 512 contiguous bytes. What a lane multiplies it copied itself: the ring of
// cp.async stages needs no barrier, and runs across rows. X lies in shared memory in its own type,
// read and converted once per step for eight rows.
//
// At the end of eight rows a lane's sums are added across the warp by a butterfly that also deals
// them out (9 shuffles for 8 sums instead of 40; those of a fifth token by one more), then across
// warps in order through shared memory: two buffers, one barrier. The order of every sum is fixed
// by K.
//
// Five tokens, and more in groups along y, are for tiny layers: their weights come out of the
// second-level cache, and what counts is how soon a kernel begins and ends. What gemv_mma.cu and
// cuBLAS take: linear_dense_choice.h.
//
// Under programmatic launch a CTA starts where one of the kernel in front has ended, and fills its
// ring while others still run. Weights are read before grid_wait(): they are older than the launch
// (launch.cuh).
#include "../common/launch.cuh"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"
#include "../ptx/async_copy.cuh"
#include "../ptx/mbarrier.cuh"
#include "gemv.h"
#include "load_shared.cuh"

namespace fastinfer::cuda {
namespace {

constexpr int kThreads = 32 * kGemvWarps;

struct Params : GemvParams {
  bool x_packs;
};

// Adds kCount sums (a power of two, at most 32) of every lane across the warp: v[0] of lane l is
// then sum l >> (5 - log2 kCount).
template <int kHalf, int kCount>
__device__ __forceinline__ void deal_sums(float (&v)[kCount], int lane, int mask = 16) {
  if constexpr (kHalf > 0) {
    const bool upper = lane & mask;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float low = v[i], high = v[i + kHalf];
      v[i] = (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, mask);
    }
    deal_sums<kHalf / 2>(v, lane, mask / 2);
  } else {
#pragma unroll
    for (; mask > 0; mask /= 2) v[0] += __shfl_xor_sync(kAllLanes, v[0], mask);
  }
}
constexpr int log2_of(int n) { return n == 1 ? 0 : 1 + log2_of(n / 2); }

// The weights of a lane: its 16 bytes of kRows rows per step, through a ring of its own.
template <int kRows>
struct Weights {
  static constexpr int kStageBytes = kRows * kGemvColumns * 2;
  const Params& p;
  const char* from;
  int64_t stride;  // bytes
  uint32_t ring;   // this lane's first 16 bytes
  int first, column, round;
  GemvRange rows;

  __device__ __forceinline__ Weights(const Params& params, uint32_t at)
      : p(params), stride(params.w_stride * 2), ring(at + threadIdx.x * 16) {
    first = static_cast<int>(threadIdx.x) * 8;
    round = -1;
    next_rows();
  }
  __device__ __forceinline__ void next_rows() {
    rows =
        gemv_rows(kRows, p.n, static_cast<int>(gridDim.x), static_cast<int>(blockIdx.x), ++round);
    column = first;
    from = static_cast<const char*>(p.w) + rows.begin * stride + column * 2;
  }
  // Nothing is read of absent rows and columns; zeros stand for them.
  __device__ __forceinline__ void load(int slot) {
    if (rows.begin < rows.end) {
      const uint32_t to = ring + slot * kStageBytes;
      const int present = column < p.k ? rows.end - rows.begin : 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        cp_async_zero(to + r * (kGemvColumns * 2), r < present ? from + r * stride : p.w,
                      r < present ? 16 : 0);
      column += kGemvColumns, from += kGemvColumns * 2;
      if (column - first == p.steps * kGemvColumns) next_rows();
    }
    cp_async_commit();
  }
};

template <class E, int kTokens, int kRows, int kStages>
__global__ void __launch_bounds__(kThreads, 1) gemv_kernel(const __grid_constant__ Params p) {
  constexpr int kMain = kTokens < 4 ? kTokens : 4, kRest = kTokens - kMain;
  constexpr int kMainSums = kRows * kMain, kSums = kRows * kTokens;
  extern __shared__ __align__(128) unsigned char shared[];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const GemvShared at = gemv_shared({kTokens, kRows, kStages}, p.steps);
  const int x_pitch = p.steps * kGemvColumns;
  const uint32_t x_base = ptx::shared_address(shared);

  grid_launch_dependents();

  const int first = static_cast<int>(blockIdx.y) * kTokens, m = p.m - first;
  const auto stage_x = [&] {
    grid_wait();
    const E* const x = static_cast<const E*>(p.x) + first * p.x_stride;
    if (p.x_packs) {
#pragma unroll 4
      for (int c = thread * 8; c < x_pitch; c += kThreads * 8) {
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          const bool there = c < p.k && t < m;
          cp_async_zero(x_base + (t * x_pitch + c) * 2, there ? x + t * p.x_stride + c : x,
                        there ? 16 : 0);
        }
      }
    } else {
#pragma unroll 1
      for (int t = 0; t < kTokens; ++t) {
        E* const to = reinterpret_cast<E*>(shared) + t * x_pitch;
#pragma unroll 1
        for (int c = thread * 8; c < x_pitch; c += kThreads * 8)
          *reinterpret_cast<uint4*>(to + c) = c < p.k && t < m
                                                  ? load_pack(x + t * p.x_stride, c, p.k, false)
                                                  : make_uint4(0, 0, 0, 0);
      }
    }
    cp_async_commit();
  };
  Weights<kRows> weights(p, x_base + at.ring);
  // x first: its loads would wait behind those of the weights. Under programmatic launch the
  // weights first, as they may be read while the kernel in front still writes x.
  if (!p.weights_first) stage_x();
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) weights.load(i);
  if (p.weights_first) {
    stage_x();
    cp_async_wait<0>();
  } else {
    cp_async_wait<kStages - 1>();
  }
  __syncthreads();

  float* const all_sums = reinterpret_cast<float*>(shared + at.sums);
  const uint32_t x_lane = x_base + thread * 16;
  int slot = 0, previous = kStages - 1, buffer = 0;
#pragma unroll 1
  for (int round = 0;; ++round) {
    const GemvRange rows =
        gemv_rows(kRows, p.n, static_cast<int>(gridDim.x), static_cast<int>(blockIdx.x), round);
    if (rows.begin >= rows.end) break;
    float sums[kMainSums] = {}, rest[kRest > 0 ? kRows * kRest : 1] = {};
    uint32_t x_at = x_lane;
#pragma unroll 1
    for (int step = 0; step < p.steps; ++step) {
      cp_async_wait<kStages - 2>();
      weights.load(previous);  // all of it was read in the last step, by this lane
      const uint32_t from = weights.ring + slot * weights.kStageBytes;
      uint4 w[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) w[r] = load_shared(from + r * (kGemvColumns * 2));
      float x[kTokens][8];
#pragma unroll
      for (int t = 0; t < kTokens; ++t) unpack<E>(x[t], load_shared(x_at + t * x_pitch * 2));
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float v[8];
        unpack<E>(v, w[r]);
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          float& sum = t < kMain ? sums[r * kMain + t] : rest[r * kRest + t - kMain];
#pragma unroll
          for (int j = 0; j < 8; ++j) sum = fmaf(v[j], x[t][j], sum);
        }
      }
      x_at += kGemvColumns * 2;
      previous = slot;
      slot = slot + 1 == kStages ? 0 : slot + 1;
    }
    deal_sums<kMainSums / 2>(sums, lane);
    constexpr int kShift = 5 - log2_of(kMainSums);
    float* const mine = all_sums + buffer * (kGemvWarps * kSums);
    if (lane % (1 << kShift) == 0) mine[warp * kSums + (lane >> kShift)] = sums[0];
    if constexpr (kRest > 0) {
      deal_sums<kRows * kRest / 2>(rest, lane);
      constexpr int kRestShift = 5 - log2_of(kRows * kRest);
      if (lane % (1 << kRestShift) == 0)
        mine[warp * kSums + kMainSums + (lane >> kRestShift)] = rest[0];
    }
    __syncthreads();  // who writes this buffer again has passed the next one
    if (thread < kSums) {
      const bool main = kRest == 0 || thread < kMainSums;
      constexpr int kDivisor = kRest > 0 ? kRest : 1;
      const int row = main ? thread / kMain : (thread - kMainSums) / kDivisor;
      const int t = main ? thread % kMain : kMain + (thread - kMainSums) % kDivisor;
      const int n = rows.begin + row;
      float v = mine[thread];
#pragma unroll
      for (int i = 1; i < kGemvWarps; ++i) v += mine[i * kSums + thread];
      if (n < rows.end && t < m) {
        if (p.bias) v = __fadd_rn(v, to_float(static_cast<const E*>(p.bias)[n]));
        static_cast<E*>(p.out)[(first + t) * p.out_stride + n] = from_float<E>(v);
      }
    }
    buffer ^= 1;
  }
}

template <class E, int kAt>
int run_kind(const Params& p, dim3 ctas, void* stream) {
  constexpr GemvKind k = kGemvKinds[kAt];
  return launch(gemv_kernel<E, k.tokens, k.rows, k.stages>, ctas, dim3(kThreads),
                gemv_shared(k, p.steps).bytes, stream, p);
}

template <class E>
int run(const Params& p, int kind, dim3 ctas, void* stream) {
  const auto with = kind == 0   ? run_kind<E, 0>
                    : kind == 1 ? run_kind<E, 1>
                    : kind == 2 ? run_kind<E, 2>
                                : run_kind<E, 3>;
  return with(p, ctas, stream);
}

}  // namespace

bool gemv_dense_fits(const DenseLinear& p) {
  return (p.dtype == DType::bf16 || p.dtype == DType::f16) && p.n > 0 && p.n <= INT32_MAX / 2 &&
         p.k % 8 == 0 && packs_fit(p.w, p.k, 2, {p.w_stride}) &&
         gemv_tokens(gemv_group(p.m, p.n, p.k), p.k, device_facts().shared_bytes) > 0;
}

int gemv_dense(const DenseLinear& p, void* stream) {
  const DeviceFacts& facts = device_facts();
  // Under programmatic launch one multiprocessor is left to the small kernels between linears.
  const int most = facts.sms - (programmatic_launch() && facts.sms > 1 ? 1 : 0);
  const int at = gemv_kind(gemv_group(p.m, p.n, p.k), p.k, facts.shared_bytes);
  const GemvKind kind = kGemvKinds[at];
  const int64_t strips = ceil_div(p.n, kind.rows);
  const auto groups = static_cast<unsigned>(ceil_div(p.m, kind.tokens));
  const int64_t each = most / groups > 0 ? most / groups : 1;
  const dim3 ctas(static_cast<unsigned>(strips < each ? strips : each), groups);
  const Params s{gemv_params(p, gemv_steps(p.k), programmatic_launch()),
                 packs_fit(p.x, p.k, 2, {p.x_stride})};
  return p.dtype == DType::bf16 ? run<__nv_bfloat16>(s, at, ctas, stream)
                                : run<__half>(s, at, ctas, stream);
}

}  // namespace fastinfer::cuda
