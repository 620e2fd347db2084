// silu(gate) * up as int8 codes per row (common/quantize_row.cuh); x [rows, 2I] = [gate, up] with
// any row strides, q [rows, I] contiguous.
//
// Few rows: the products of a row stay in the registers of one block or of a cluster of blocks,
// because a single row would keep one multiprocessor busy with exponentials for a microsecond.
//
// Many rows: one block per row; the first pass computes the products in fp32, keeps them in shared
// memory (each thread reads back only what it wrote, so no barrier guards them) and finds their
// range; the second turns them into codes. A row wider than shared memory is computed twice. Minima
// and maxima do not depend on their order, so the number of threads may follow the number of rows.
#include "../common/quantize_row.cuh"
#include "../ptx/cluster.cuh"
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
  __shared__ uint2 scratch[32];
  const cpu::GatedParams& p = a.p.gated;
  const int64_t r = blockIdx.x;
  const int inner = static_cast<int>(p.inner), packs = (inner + kSize - 1) / kSize;
  RowGroup group(blockDim.x);
  grid_launch_dependents();
  grid_wait();
  const E* gate = static_cast<const E*>(p.x.data) + row_offset_of(p.shape, p.x, r);
  const E* up = gate + inner;
  RowRange range;
  for (int base = threadIdx.x; base < packs; base += blockDim.x * kUnroll) {
    uint4 g[kUnroll], u[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int at = base + k * blockDim.x;
      g[k] = at < packs ? load_pack(gate, at * kSize, inner, a.packs) : uint4{};
      u[k] = at < packs ? load_pack(up, at * kSize, inner, a.packs) : uint4{};
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int at = base + k * blockDim.x;
      float y[kSize];
      product<E>(y, g[k], u[k]);
      range.add(y, !a.p.zeros);
      if (a.staged && at < packs) {
#pragma unroll
        for (int h = 0; h < kQuads; ++h)
          staged[h * packs + at] = make_float4(y[4 * h], y[4 * h + 1], y[4 * h + 2], y[4 * h + 3]);
      }
    }
  }
  const RowCodes codes =
      row_codes(reduce_range(group, range, !a.p.zeros, scratch), a.p.zeros != nullptr);
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
        product<E>(y, load_pack(gate, at * kSize, inner, a.packs),
                   load_pack(up, at * kSize, inner, a.packs));
      }
      codes.template store<decltype(tag)::mode>(q, at * kSize, inner, a.code_packs, y);
    }
  });
}

constexpr int kMaxCtas = 8;

struct GatedFewLaunch {
  const void* x;
  int8_t* q;
  float* scale;
  int64_t stride;  // of x
  int32_t inner, ctas;
};

// Symmetric codes, in as little code as that takes (see QuickCodes).
template <class E, bool kCluster>
__global__ void __launch_bounds__(kMaxRowThreads)
    gated_few_kernel(const __grid_constant__ GatedFewLaunch a) {
  static_assert(Pack<E>::kSize == 8, "16-bit elements");
  __shared__ uint64_t scratch[32];
  uint32_t rank = 0, r = blockIdx.x;
  if (kCluster) rank = cluster_rank(), r = blockIdx.x / a.ctas;
  const uint32_t lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const uint32_t at = rank * blockDim.x + threadIdx.x, packs = a.inner / 8;
  const bool holds = at < packs;
  grid_launch_dependents();
  grid_wait();
  const uint4* gate =
      reinterpret_cast<const uint4*>(static_cast<const E*>(a.x) + r * a.stride) + at;
  uint4 g{}, u{};
  if (holds) g = gate[0], u = gate[packs];
  float y[8];
  product<E>(y, g, u);
  uint32_t top = __reduce_max_sync(kAllLanes, top_of_eight(y));
  if (lane == 0) scratch[threadIdx.x / 32] = top;
  if (kCluster) {
    cluster_sync_shared();
    top = 0;
    for (uint32_t w = lane; w < warps * a.ctas; w += 32)
      top = max(top, static_cast<uint32_t>(cluster_load(scratch + w % warps, w / warps)));
    top = __reduce_max_sync(kAllLanes, top);
    cluster_arrive();  // its reads are over
  } else {
    __syncthreads();
    top = 0;
    if (lane < warps) top = static_cast<uint32_t>(scratch[lane]);
    top = __reduce_max_sync(kAllLanes, top);
  }
  uint2 words;
  float scale;
  if (QuickCodes::fits(top)) {
    const QuickCodes codes(top);
    words = codes.words(y), scale = codes.scale;
  } else {
    const RareCodes codes = rare_codes(top, 1.0f, y);
    words = codes.words, scale = codes.scale;
  }
  if (holds) reinterpret_cast<uint2*>(a.q)[static_cast<int64_t>(r) * packs + at] = words;
  if (at == 0) a.scale[r] = scale;
  if (kCluster) cluster_wait();
}

// CTAs that share a row, 0: a row is too long for this form.
constexpr int few_ctas(int64_t rows, int64_t packs, int sms, bool clusters) {
  constexpr int64_t kLeast = 128, kAlone = 512;  // packs of a CTA in a cluster, and of one alone
  int ctas = 1;
  while (clusters && packs > kAlone && ctas < kMaxCtas && 2 * ctas * rows <= sms &&
         packs >= 2 * ctas * kLeast)
    ctas *= 2;
  return packs <= int64_t{kMaxRowThreads} * ctas ? ctas : 0;
}

static_assert(few_ctas(1, 512, 132, true) == 1 && few_ctas(1, 1792, 132, true) == 8, "one row");
static_assert(few_ctas(100, 512, 132, true) == 1 && few_ctas(100, 1792, 132, true) == 0, "many");

template <class E>
int launch_few(const cpu::GatedQuantParams& p, int64_t rows, int64_t packs, int ctas,
               void* stream) {
  const cpu::GatedParams& g = p.gated;
  const GatedFewLaunch a{g.x.data, p.q, p.scale, g.x.stride[0], static_cast<int32_t>(g.inner),
                         ctas};
  const auto threads = static_cast<unsigned>(ceil_div(ceil_div(packs, ctas), 32) * 32);
  if (ctas == 1)
    return launch(gated_few_kernel<E, false>, static_cast<unsigned>(rows), threads, 0, stream, a);
  return launch_clusters(gated_few_kernel<E, true>, ctas, static_cast<unsigned>(rows * ctas),
                         threads, 0, stream, a);
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
    if constexpr (sizeof(E) == 2) {
      if (few && packs > 0 && a.packs && a.code_packs && g.shape.ndim == 1 && !p.zeros) {
        const int ctas =
            few_ctas(rows, packs, device_facts().sms, clusters_work<gated_few_kernel<E, true>>());
        if (ctas > 0) return launch_few<E>(p, rows, packs, ctas, stream);
      }
    }
    const int limit_threads = few ? kMaxRowThreads : 512;
    const int64_t want = packs > 0 ? ceil_div(packs, few ? 1 : kUnroll) : 1;
    const int threads =
        static_cast<int>(want < limit_threads ? ceil_div(want, 32) * 32 : limit_threads);
    return launch(gated_quant_kernel<E>, static_cast<unsigned>(rows), threads,
                  a.staged ? static_cast<size_t>(bytes) : 0, stream, a);
  });
}

}  // namespace fastinfer::cuda
