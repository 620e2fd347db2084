// silu(gate) * up as int8 codes per row (common/quantize_row.cuh); x [rows, 2I] = [gate, up] with
// any row strides, q [rows, I] contiguous.
//
// One block per row: the first pass computes the products in fp32, keeps them in shared memory
// (each thread reads back only what it wrote, so no barrier guards them) and finds their range; the
// second turns them into codes. A row wider than shared memory is computed twice. Minima and maxima
// do not depend on their order, so the number of threads may follow the number of rows.
#include "../common/quantize_row.cuh"
#include "activation.h"
#include "gate.cuh"

namespace fastinfer::cuda {
namespace {

constexpr int kUnroll = 2;  // packs of gate and of up under way per thread

struct GatedQuantLaunch {
  cpu::GatedQuantParams p;
  bool packs, code_packs, staged;
};

template <class E>
__device__ __forceinline__ void product(float (&y)[Pack<E>::kSize], const uint4& gate,
                                        const uint4& up) {
  float u[Pack<E>::kSize];
  unpack<E>(y, gate);
  unpack<E>(u, up);
#pragma unroll
  for (int j = 0; j < Pack<E>::kSize; ++j) y[j] = activate<cpu::Activation::silu, E>(y[j]) * u[j];
}

template <class E>
__global__ void __maxnreg__(40) gated_quant_kernel(const __grid_constant__ GatedQuantLaunch a) {
  constexpr int kSize = Pack<E>::kSize, kQuads = kSize / 4;
  extern __shared__ float4 staged[];  // quad h of pack k at [h * packs + k]: no bank conflicts
  __shared__ RowScratch<uint2> ranges;
  const cpu::GatedParams& p = a.p.gated;
  const int64_t r = blockIdx.x;
  const int inner = static_cast<int>(p.inner), packs = (inner + kSize - 1) / kSize;
  RowGroup group(blockDim.x);
  grid_wait();
  const E* gate = static_cast<const E*>(p.x.data) + row_offset_of(p.shape, p.x, r);
  const E* up = gate + inner;
  RowRange range;
  for (int base = threadIdx.x; base < packs; base += blockDim.x * kUnroll) {
    uint4 g[kUnroll], u[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int at = base + k * blockDim.x;
      g[k] = at < packs ? load_row_pack(gate, at * kSize, inner, a.packs) : uint4{};
      u[k] = at < packs ? load_row_pack(up, at * kSize, inner, a.packs) : uint4{};
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int at = base + k * blockDim.x;
      float y[kSize];
      product<E>(y, g[k], u[k]);
      range.add(y);
      if (a.staged && at < packs) {
#pragma unroll
        for (int h = 0; h < kQuads; ++h)
          staged[h * packs + at] = make_float4(y[4 * h], y[4 * h + 1], y[4 * h + 2], y[4 * h + 3]);
      }
    }
  }
  grid_launch_dependents();
  const RowCodes codes =
      row_codes(reduce_range(group, range, !a.p.zeros, ranges), a.p.zeros != nullptr);
  if (threadIdx.x == 0) {
    a.p.scale[r] = codes.scale;
    if (a.p.zeros) a.p.zeros[r] = codes.zero;
  }
  int8_t* q = a.p.q + r * inner;
  with_mode(codes.mode, [&](auto tag) {
    for (int at = threadIdx.x; at < packs; at += blockDim.x) {
      float y[kSize];
      if (a.staged) {
#pragma unroll
        for (int h = 0; h < kQuads; ++h) {
          const float4 four = staged[h * packs + at];
          y[4 * h] = four.x, y[4 * h + 1] = four.y, y[4 * h + 2] = four.z, y[4 * h + 3] = four.w;
        }
      } else {
        product<E>(y, load_row_pack(gate, at * kSize, inner, a.packs),
                   load_row_pack(up, at * kSize, inner, a.packs));
      }
      codes.template store<decltype(tag)::mode>(q, at * kSize, inner, a.code_packs, y);
    }
  });
}

}  // namespace

int silu_and_mul_quant(const cpu::GatedQuantParams& p, int64_t rows, void* stream) {
  const cpu::GatedParams& g = p.gated;
  return with_float(g.dtype, [&](auto element) {
    using E = decltype(element);
    constexpr int kSize = Pack<E>::kSize;
    const int64_t packs = ceil_div(g.inner, kSize), bytes = packs * kSize * int64_t{sizeof(float)};
    // As far as it goes, but at least some of the multiprocessor's memory stays a cache. Beside it
    // lies the scratch of the reductions, and 1 KiB is the system's.
    const int64_t limit = device_facts().shared_bytes, most = 162 * 1024;
    const int64_t most_shared = (limit < most ? limit : most) - 2048;
    GatedQuantLaunch a{p, false, false, bytes <= most_shared};
    a.packs = row_packs(g.shape, g.x, g.inner, sizeof(E));
    a.code_packs = reinterpret_cast<uintptr_t>(p.q) % kSize == 0 && g.inner % kSize == 0;
    // Few rows: as many threads as there is work for. Many: several blocks per multiprocessor.
    const bool few = rows <= 2 * device_facts().sms;
    const int limit_threads = few ? kMaxRowThreads : 512;
    const int64_t want = ceil_div(packs, few ? 1 : kUnroll);
    const int threads =
        static_cast<int>(want < limit_threads ? ceil_div(want, 32) * 32 : limit_threads);
    return launch(gated_quant_kernel<E>, static_cast<unsigned>(rows), threads,
                  a.staged ? static_cast<size_t>(bytes) : 0, stream, a);
  });
}

}  // namespace fastinfer::cuda
