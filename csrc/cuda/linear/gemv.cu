// Y[M, N] = X[M, K] W[N, K]^T + bias for one to four tokens and 16-bit weights: plain fp32 FMAs, no
// tensor cores; the weights pass once, at memory speed.
//
// A persistent CTA per multiprocessor takes an even, contiguous part of the rows, four at a time.
// Its 8 warps split the columns: in a step of 2048 columns, lane l of warp w owns the 8 at
// 256 w + 8 l, so that every load of a warp is 512 contiguous bytes. What a lane multiplies it
// copied itself: the ring of cp.async stages (96 KiB) needs no barrier, and runs across rows. X
// lies in shared memory in its own type, read once per step and four rows.
//
// At the end of four rows a lane's sums are added across the warp by a butterfly that also deals
// them out (6 shuffles for 4 sums instead of 20), then across warps in order through shared memory:
// two buffers, one barrier. The order of every sum is fixed by K.
//
// Half a multiprocessor is enough (96 KiB and X; 256 threads): under programmatic launch the next
// linear lies beside this one with its ring full of weights while this one runs, and its successor
// fills the memory's idle time between the two. Weights are read before grid_wait(): they are older
// than the launch (launch.cuh).
#include "../common/launch.cuh"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"
#include "../ptx/async_copy.cuh"
#include "../ptx/mbarrier.cuh"
#include "gemv.h"

namespace fastinfer::cuda {
namespace {

constexpr int kThreads = 32 * kGemvWarps;

struct Params {
  const void* x;
  int64_t x_stride;
  const void* w;
  int64_t w_stride;
  void* out;
  int64_t out_stride;
  const void* bias;
  int m, n, k, steps, stages;
  bool x_packs, weights_first;
};

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

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
// At most `count` of this thread's newest groups are under way: that of one of the rings.
__device__ __forceinline__ void wait_pending(int count) {
  switch (count) {
    case 11:
      return cp_async_wait<11>();
    case 10:
      return cp_async_wait<10>();
    case 7:
      return cp_async_wait<7>();
    case 6:
      return cp_async_wait<6>();
    case 5:
      return cp_async_wait<5>();
    case 4:
      return cp_async_wait<4>();
    case 3:
      return cp_async_wait<3>();
    default:
      return cp_async_wait<2>();
  }
}

constexpr int log2_of(int n) { return n == 1 ? 0 : 1 + log2_of(n / 2); }

// The weights of a lane: its 16 bytes of four rows per step, through a ring of its own.
struct Weights {
  const char* from;
  int64_t stride;  // bytes
  uint32_t ring;   // this lane's first 16 bytes
  int row, last, column, k, steps, step;

  __device__ __forceinline__ void load(int slot) {
    if (row < last) {
      const uint32_t to = ring + slot * kGemvStageBytes;
#pragma unroll
      for (int r = 0; r < kGemvRows; ++r) {
        const bool there = column < k && row + r < last;
        cp_async_zero(to + r * (kGemvColumns * 2), there ? from + r * stride : from,
                      there ? 16 : 0);
      }
      column += kGemvColumns, from += kGemvColumns * 2;
      if (++step == steps) {
        step = 0, column -= steps * kGemvColumns, row += kGemvRows;
        from += kGemvRows * stride - static_cast<int64_t>(steps) * (kGemvColumns * 2);
      }
    }
    cp_async_commit();
  }
};

template <class E, int kTokens>
__global__ void __launch_bounds__(kThreads) gemv_kernel(const __grid_constant__ Params p) {
  constexpr int kSums = kGemvRows * kTokens;
  extern __shared__ __align__(128) unsigned char shared[];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const GemvShared at = gemv_shared(kTokens, p.steps, p.stages);
  const int x_pitch = p.steps * kGemvColumns;
  const uint32_t x_base = ptx::shared_address(shared);
  const int first = static_cast<int>(static_cast<int64_t>(p.n) * blockIdx.x / gridDim.x),
            last = static_cast<int>(static_cast<int64_t>(p.n) * (blockIdx.x + 1) / gridDim.x);

  grid_launch_dependents();

  const auto stage_x = [&] {
    grid_wait();
#pragma unroll 1
    for (int token = 0; token < kTokens; ++token) {
      const E* row = static_cast<const E*>(p.x) + token * p.x_stride;
      E* to = reinterpret_cast<E*>(shared) + token * x_pitch;
#pragma unroll 1
      for (int c = thread * 8; c < x_pitch; c += kThreads * 8) {
        const bool there = c < p.k && token < p.m;
        if (p.x_packs) {
          cp_async_zero(ptx::shared_address(to + c), there ? row + c : static_cast<const E*>(p.x),
                        there ? 16 : 0);
        } else {
          *reinterpret_cast<uint4*>(to + c) =
              there ? load_pack(row, c, p.k, false) : make_uint4(0, 0, 0, 0);
        }
      }
    }
    cp_async_commit();
  };
  Weights weights{static_cast<const char*>(p.w) + (first * p.w_stride + warp * 256 + lane * 8) *
                                                      static_cast<int64_t>(sizeof(E)),
                  p.w_stride * static_cast<int64_t>(sizeof(E)),
                  x_base + at.ring + thread * 16,
                  first,
                  last,
                  warp * 256 + lane * 8,
                  p.k,
                  p.steps,
                  0};
  // x first: its loads would wait behind those of the weights. Under programmatic launch the
  // weights first, as they may be read while the kernel in front still writes x.
  if (!p.weights_first) stage_x();
#pragma unroll 1
  for (int i = 0; i < p.stages - 1; ++i) weights.load(i);
  if (p.weights_first) {
    stage_x();
    cp_async_wait<0>();
  } else {
    wait_pending(p.stages - 1);
  }
  __syncthreads();

  float* const all_sums = reinterpret_cast<float*>(shared + at.sums);
  const uint32_t x_lane = x_base + thread * 16;
  int slot = 0, previous = p.stages - 1, buffer = 0;
#pragma unroll 1
  for (int row = first; row < last; row += kGemvRows) {
    float sums[kSums] = {};
    uint32_t x_at = x_lane;
#pragma unroll 1
    for (int step = 0; step < p.steps; ++step) {
      wait_pending(p.stages - 2);
      weights.load(previous);  // all of it was read in the last step, by this lane
      const uint32_t from = weights.ring + slot * kGemvStageBytes;
      uint4 w[kGemvRows];
#pragma unroll
      for (int r = 0; r < kGemvRows; ++r) w[r] = load_shared(from + r * (kGemvColumns * 2));
      float x[kTokens][8];
#pragma unroll
      for (int t = 0; t < kTokens; ++t) unpack<E>(x[t], load_shared(x_at + t * x_pitch * 2));
#pragma unroll
      for (int r = 0; r < kGemvRows; ++r) {
        float v[8];
        unpack<E>(v, w[r]);
#pragma unroll
        for (int t = 0; t < kTokens; ++t)
#pragma unroll
          for (int j = 0; j < 8; ++j)
            sums[r * kTokens + t] = fmaf(v[j], x[t][j], sums[r * kTokens + t]);
      }
      x_at += kGemvColumns * 2;
      previous = slot;
      slot = slot + 1 == p.stages ? 0 : slot + 1;
    }
    deal_sums<kSums / 2>(sums, lane);
    constexpr int kShift = 5 - log2_of(kSums);
    float* const mine = all_sums + buffer * (kGemvWarps * kSums);
    if (lane % (1 << kShift) == 0) mine[warp * kSums + (lane >> kShift)] = sums[0];
    __syncthreads();  // who writes this buffer again has passed the next one
    if (thread < kSums) {
      const int n = row + thread / kTokens, t = thread % kTokens;
      float v = mine[thread];
#pragma unroll
      for (int i = 1; i < kGemvWarps; ++i) v += mine[i * kSums + thread];
      if (n < last && t < p.m) {
        if (p.bias) v = __fadd_rn(v, to_float(static_cast<const E*>(p.bias)[n]));
        static_cast<E*>(p.out)[t * p.out_stride + n] = from_float<E>(v);
      }
    }
    buffer ^= 1;
  }
}

template <class E>
int run(const Params& p, int tokens, void* stream) {
  const int sms = device_facts().sms;
  const auto kernel = tokens == 1   ? gemv_kernel<E, 1>
                      : tokens == 2 ? gemv_kernel<E, 2>
                                    : gemv_kernel<E, 4>;
  const dim3 grid(static_cast<unsigned>(p.n < sms ? p.n : sms));
  return launch(kernel, grid, dim3(kThreads), gemv_shared(tokens, p.steps, p.stages).bytes, stream,
                p);
}

}  // namespace

bool gemv_dense_fits(const DenseLinear& p) {
  return (p.dtype == DType::bf16 || p.dtype == DType::f16) && p.n > 0 && p.n <= INT32_MAX / 2 &&
         p.k % 8 == 0 && packs_fit(p.w, p.k, 2, {p.w_stride}) &&
         gemv_stages(p.m, p.k, false, device_facts().shared_bytes) > 0;
}

int gemv_dense(const DenseLinear& p, void* stream) {
  Params s{};
  s.x = p.x, s.x_stride = p.x_stride;
  s.w = p.w, s.w_stride = p.w_stride;
  s.out = p.out, s.out_stride = p.out_stride, s.bias = p.bias;
  s.m = static_cast<int>(p.m), s.n = static_cast<int>(p.n), s.k = static_cast<int>(p.k);
  s.steps = static_cast<int>(gemv_steps(p.k));
  s.stages = gemv_stages(p.m, p.k, programmatic_launch(), device_facts().shared_bytes);
  s.x_packs = packs_fit(p.x, p.k, 2, {p.x_stride});
  s.weights_first = programmatic_launch();
  const int tokens = gemv_instance(p.m);
  return p.dtype == DType::bf16 ? run<__nv_bfloat16>(s, tokens, stream)
                                : run<__half>(s, tokens, stream);
}

}  // namespace fastinfer::cuda
