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

struct GatedHeldLaunch {
  const void* x;
  int8_t* q;
  float* scale;
  int32_t* zeros;
  int64_t stride[2];    // of x
  uint32_t inner_rows;  // 0: one row dimension, of stride [1]
  int32_t inner, ctas;
};

template <class E>
__global__ void __launch_bounds__(kMaxRowThreads)
    gated_held_kernel(const __grid_constant__ GatedHeldLaunch a) {
  constexpr int kSize = Pack<E>::kSize;
  __shared__ uint64_t scratch[32];
  const uint32_t rank = cluster_rank(), r = blockIdx.x / a.ctas;
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32, all_warps = warps * a.ctas;
  const int at = rank * blockDim.x + threadIdx.x, packs = a.inner / kSize;
  const bool symmetric = !a.zeros;
  uint32_t outer = 0, inner = r;
  if (a.inner_rows) outer = r / a.inner_rows, inner = r % a.inner_rows;
  grid_launch_dependents();
  grid_wait();
  const uint4* gate = reinterpret_cast<const uint4*>(static_cast<const E*>(a.x) +
                                                     outer * a.stride[0] + inner * a.stride[1]);
  const uint4* up = gate + packs;
  uint4 g{}, u{};
  if (at < packs) g = gate[at], u = up[at];
  float y[kSize];
  product<E>(y, g, u);
  RowRange range;
  range.add(y, symmetric);
  uint2 bits = max_over_lanes(range_bits(range), 32, symmetric);
  if (lane == 0) scratch[threadIdx.x / 32] = static_cast<uint64_t>(bits.y) << 32 | bits.x;
  if (a.ctas == 1) {
    __syncthreads();
  } else {
    cluster_sync_shared();
  }
  bits = make_uint2(0, 0);
  for (int w = lane; w < all_warps; w += 32) {
    const uint64_t other = a.ctas == 1 ? scratch[w] : cluster_load(scratch + w % warps, w / warps);
    bits.x = max(bits.x, static_cast<uint32_t>(other));
    bits.y = max(bits.y, static_cast<uint32_t>(other >> 32));
  }
  bits = max_over_lanes(bits, 32, symmetric);
  if (a.ctas > 1) cluster_arrive();  // its reads are over
  const RowCodes codes = row_codes(range_of_bits(bits), !symmetric);
  if (at == 0) {
    a.scale[r] = codes.scale;
    if (a.zeros) a.zeros[r] = codes.zero;
  }
  int8_t* q = a.q + static_cast<int64_t>(r) * a.inner;
  with_mode(codes.mode, [&](auto tag) {
    if (at < packs) codes.template store<decltype(tag)::mode>(q, at * kSize, a.inner, true, y);
  });
  if (a.ctas > 1) cluster_wait();
}

// Compiled for sm_90 or newer, not translated from older PTX: only then does the code know
// clusters.
template <class E>
bool clusters_work() {
  static const bool yes = [] {
    cudaFuncAttributes a;
    return cudaFuncGetAttributes(&a, gated_held_kernel<E>) == cudaSuccess && a.ptxVersion >= 90;
  }();
  return yes;
}

// CTAs that share a row, 0: a row is too long for this form.
constexpr int held_ctas(int64_t rows, int64_t packs, int sms, bool clusters) {
  constexpr int64_t kLeast = 128;  // packs of a CTA
  int ctas = 1;
  while (clusters && ctas < kMaxCtas && 2 * ctas * rows <= sms && packs >= 2 * ctas * kLeast)
    ctas *= 2;
  return packs <= int64_t{kMaxRowThreads} * ctas ? ctas : 0;
}

static_assert(held_ctas(1, 512, 132, true) == 4 && held_ctas(1, 1792, 132, true) == 8, "one row");
static_assert(held_ctas(100, 512, 132, true) == 1 && held_ctas(100, 1792, 132, true) == 0, "many");

template <class E>
int launch_held(const cpu::GatedQuantParams& p, int64_t rows, int64_t packs, int ctas,
                void* stream) {
  const cpu::GatedParams& g = p.gated;
  const bool two = g.shape.ndim == 2;
  GatedHeldLaunch a{g.x.data, p.q, p.scale, p.zeros};
  a.stride[0] = g.x.stride[0], a.stride[1] = g.x.stride[two ? 1 : 0];
  a.inner_rows = two ? static_cast<uint32_t>(g.shape.size[1]) : 0;
  a.inner = static_cast<int32_t>(g.inner);
  a.ctas = ctas;
  const int64_t threads = ceil_div(ceil_div(packs, a.ctas), 32) * 32;
  return launch_clusters(gated_held_kernel<E>, a.ctas, static_cast<unsigned>(rows * a.ctas),
                         static_cast<unsigned>(threads), 0, stream, a);
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
      if (few && a.packs && a.code_packs && g.shape.ndim <= 2) {
        const DeviceFacts& facts = device_facts();
        const bool clusters =
            facts.compute_capability >= 90 && !force_portable() && clusters_work<E>();
        const int ctas = held_ctas(rows, packs, facts.sms, clusters);
        if (ctas > 0) return launch_held<E>(p, rows, packs, ctas, stream);
      }
    }
    const int limit_threads = few ? kMaxRowThreads : 512;
    const int64_t want = ceil_div(packs, few ? 1 : kUnroll);
    const int threads =
        static_cast<int>(want < limit_threads ? ceil_div(want, 32) * 32 : limit_threads);
    return launch(gated_quant_kernel<E>, static_cast<unsigned>(rows), threads,
                  a.staged ? static_cast<size_t>(bytes) : 0, stream, a);
  });
}

}  // namespace fastinfer::cuda
