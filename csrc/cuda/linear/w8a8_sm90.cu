// w8a8_linear by wgmma (sm_90a): tiles of 128 tokens x kWidth channels, K in steps of 128.
//
// A CTA has two consumer warpgroups of 64 tokens each and a producer whose one thread keeps a ring
// of stages full by TMA: X [128][128 bytes], W [kWidth][128 bytes], 128-byte swizzled. What lies
// outside the matrices arrives as zeros. Three ways to use CTAs:
//   alone      persistent: a CTA walks the tiles in steps of the grid;
//   pair       two CTAs of a cluster take neighbouring token tiles of the same channels, also
//              persistent. Each loads half of the W stage for both (multicast), which halves the
//              reads of W from L2; a stage is free when the consumers of both have read it;
//   split      where tiles are fewer than SMs: the CTAs of a cluster share the K of one tile, leave
//              their sums in shared memory and each finishes a part of the channels. Exact in any
//              order.
// Tiles go in bands of kBand rows of tiles, so that those under way at one time share X and W.
#include "../common/launch_cluster.cuh"
#include "../ptx/cluster.cuh"
#include "../ptx/tma_cluster.cuh"
#include "../ptx/wgmma_s8.cuh"
#include "tensor_maps.h"
#include "w8a8.h"
#include "w8a8_finish.cuh"

namespace fastinfer::cuda {
namespace {

constexpr int kTokens = 128, kStepBytes = 128, kThreads = 384;
constexpr int kBand = 8;

template <int kWidth>
struct Tile {
  static constexpr int kXBytes = kTokens * kStepBytes, kWBytes = kWidth * kStepBytes;
  static constexpr int kStageBytes = kXBytes + kWBytes;
  static constexpr int kStages = 200 * 1024 / kStageBytes;
  // Scales, bias and weight sums of the tile's channels, once per consumer.
  static constexpr int kVectorBytes = 2 * 3 * kWidth * 4;
  static constexpr int kSharedBytes = 1024 + kStages * kStageBytes + kVectorBytes + 2 * kStages * 8;
  static_assert(kSharedBytes <= 227 * 1024, "shared memory of one CTA");
};

struct Launch {
  CUtensorMap x_map, w_map;
  cpu::Int8Params p;
  int32_t k_steps, units, token_units, channel_tiles;  // a unit: `pair` token tiles
  int32_t pair;                                        // CTAs that share W: 1 or 2
  int32_t split;  // CTAs that share K: 1, or a power of two with pair = 1 and one tile per cluster
  bool packs;     // out is written in 16-byte packs
};

struct Unit {
  int32_t tokens, channels;  // tile numbers: of the cluster's first token tile, of channels
};

__device__ __forceinline__ Unit unit_at(const Launch& a, int32_t u) {
  const int32_t per_band = kBand * a.channel_tiles, band = u / per_band, in_band = u % per_band;
  const int32_t rows = min(kBand, a.token_units - band * kBand);
  return {band * kBand + in_band % rows, in_band / rows};
}

// What a CTA works on: which half of a pair it is, its units and its steps of K.
struct Share {
  int32_t half, first, step, k_begin, k_end;
};

__device__ __forceinline__ Share share_of(const Launch& a) {
  const auto rank = static_cast<int32_t>(cluster_rank());
  const int32_t ctas = a.pair * a.split, part = a.split > 1 ? rank : 0;
  return {a.pair > 1 ? rank : 0, static_cast<int32_t>(blockIdx.x) / ctas,
          static_cast<int32_t>(gridDim.x) / ctas, part * a.k_steps / a.split,
          (part + 1) * a.k_steps / a.split};
}

template <int kWidth>
__device__ __forceinline__ void produce(const Launch& a, const Share& share, uint32_t stages,
                                        uint64_t* full, uint64_t* empty) {
  using T = Tile<kWidth>;
  constexpr int kHalf = kWidth / 2;
  const auto load_x = [&](int stage, const Unit& unit, int32_t k) {
    ptx::tma_load_2d(stages + stage * T::kStageBytes, &a.x_map, full + stage, k * kStepBytes,
                     (unit.tokens * a.pair + share.half) * kTokens);
  };
  const auto load_w = [&](int stage, const Unit& unit, int32_t k) {
    const uint32_t to = stages + stage * T::kStageBytes + T::kXBytes;
    const int32_t n0 = unit.channels * kWidth, half = share.half;
    if (a.pair == 2) {
      ptx::tma_load_2d_multicast(to + half * kHalf * kStepBytes, &a.w_map, full + stage,
                                 k * kStepBytes, n0 + half * kHalf, 3);
    } else {
      ptx::tma_load_2d(to, &a.w_map, full + stage, k * kStepBytes, n0);
      ptx::tma_load_2d(to + kHalf * kStepBytes, &a.w_map, full + stage, k * kStepBytes, n0 + kHalf);
    }
  };
  // The ring is filled with weights before the wait: no kernel right in front writes those.
  const int32_t early = min(share.k_begin + T::kStages, share.k_end);
  const Unit start = unit_at(a, share.first);
  for (int32_t k = share.k_begin; k < early; ++k) {
    ptx::mbarrier_arrive_expect(full + k - share.k_begin, T::kStageBytes);
    load_w(k - share.k_begin, start, k);
  }
  grid_wait();
  int stage = 0;
  uint32_t phase = 0;
  for (int32_t u = share.first; u < a.units; u += share.step) {
    const Unit unit = unit_at(a, u);
    for (int32_t k = share.k_begin; k < share.k_end; ++k) {
      if (u > share.first || k >= early) {
        ptx::mbarrier_wait(empty + stage, phase ^ 1);
        ptx::mbarrier_arrive_expect(full + stage, T::kStageBytes);
        load_w(stage, unit, k);
      }
      load_x(stage, unit, k);
      if (++stage == T::kStages) stage = 0, phase ^= 1;
    }
  }
}

// Words of four 8-column blocks, transposed among the four lanes of a quad: lane t ends up with the
// four words of block t, which are neighbours in memory.
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4], int t) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(0xFFFFFFFFu, t & 1 ? w[i] : w[i + 1], 1);
    if (t & 1)
      w[i] = got;
    else
      w[i + 1] = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(0xFFFFFFFFu, t & 2 ? w[i] : w[i + 2], 2);
    if (t & 2)
      w[i] = got;
    else
      w[i + 2] = got;
  }
}

// Sums of 64 x kWidth outputs to memory, those of columns [32 begin, 32 end) of the tile. `scale`,
// `bias`, `sums`: of the tile's channels.
template <int kWidth, bool kZeros>
__device__ __forceinline__ void finish(const Launch& a, const int32_t (&d)[kWidth / 2], int64_t m0,
                                       int64_t n0, const float* scale, const float* bias,
                                       const int32_t* sums, int begin, int end) {
  const cpu::Int8Params& p = a.p;
  const int lane = static_cast<int>(threadIdx.x) % 32, t = lane % 4;
  const bool has_bias = p.out.bias != nullptr;
  const DType type = p.out.dtype;
  const bool wide = type == DType::f32;
  int64_t row[2];
  bool inside[2];
  float x_scale[2];
  int32_t zero[2] = {};
  char* out[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    row[h] = m0 + static_cast<int>(threadIdx.x) % 128 / 32 * 16 + lane / 4 + 8 * h;
    inside[h] = row[h] < p.m;
    x_scale[h] = inside[h] ? p.x_scale[row[h]] : 0.0f;
    if constexpr (kZeros) zero[h] = inside[h] ? p.x_zeros[row[h]] : 0;
    out[h] = static_cast<char*>(p.out.data) + row[h] * p.out.stride * (wide ? 4 : 2);
  }
#pragma unroll
  for (int j = 0; j < kWidth / 8; j += 4) {
    if (j < 4 * begin || j >= 4 * end) continue;
    uint32_t w[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int c = 8 * (j + i) + 2 * t;
      const float2 s = *reinterpret_cast<const float2*>(scale + c);
      const float2 b = *reinterpret_cast<const float2*>(bias + c);
      int2 sum = make_int2(0, 0);
      if constexpr (kZeros) sum = *reinterpret_cast<const int2*>(sums + c);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int at = 4 * (j + i) + 2 * h;
        const float v0 = w8a8_value(d[at], zero[h], sum.x, x_scale[h], s.x, has_bias, b.x);
        const float v1 = w8a8_value(d[at + 1], zero[h], sum.y, x_scale[h], s.y, has_bias, b.y);
        if (!wide) {
          w[h][i] = pack_pair(type, v0, v1);
        } else if (inside[h]) {
          float* to = reinterpret_cast<float*>(out[h]) + n0 + c;
          if (a.packs && n0 + c + 2 <= p.n) {
            *reinterpret_cast<float2*>(to) = make_float2(v0, v1);
          } else {
            if (n0 + c < p.n) to[0] = v0;
            if (n0 + c + 1 < p.n) to[1] = v1;
          }
        }
      }
    }
    if (wide) continue;
    const int64_t n = n0 + 8 * (j + t);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      transpose_quad(w[h], t);
      if (!inside[h]) continue;
      uint16_t* to = reinterpret_cast<uint16_t*>(out[h]) + n;
      if (a.packs && n + 8 <= p.n) {
        *reinterpret_cast<uint4*>(to) = make_uint4(w[h][0], w[h][1], w[h][2], w[h][3]);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (n + i < p.n) to[i] = static_cast<uint16_t>(w[h][i / 2] >> 16 * (i % 2));
      }
    }
  }
}

// Adds the sums of the other CTAs of the cluster, which share K, to those of the 32-column blocks
// [begin, end). `room`: shared memory of the ring, which nobody needs any more.
template <int kWidth>
__device__ __forceinline__ void add_other_sums(int32_t (&d)[kWidth / 2], uint32_t room, int split,
                                               bool active, int begin, int end) {
  const uint32_t rank = cluster_rank();
  const uint32_t mine = room + (threadIdx.x - 128) * 4;
  ptx::named_sync(3, 256);  // both groups have read the ring
  if (active)
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i)
      asm volatile("st.shared.s32 [%0], %1;" ::"r"(mine + i * 1024), "r"(d[i]) : "memory");
  cluster_sync_shared();
  if (active)
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      if (i < 16 * begin || i >= 16 * end) continue;
      for (int c = 1; c < split; ++c)
        d[i] += ptx::load_from(mine + i * 1024, (rank + c) & (split - 1));
    }
}

template <int kWidth>
__device__ __forceinline__ void consume(const Launch& a, const Share& share, uint32_t stages,
                                        float* vectors, uint64_t* full, uint64_t* empty) {
  using T = Tile<kWidth>;
  constexpr int kPerThread = (kWidth + 127) / 128, kBlocks = kWidth / 32;
  const int group = static_cast<int>(threadIdx.x) / 128 - 1;
  const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32;
  float* scale = vectors + group * 3 * kWidth;
  float* bias = scale + kWidth;
  auto* sums = reinterpret_cast<int32_t*>(bias + kWidth);
  const cpu::Int8Params& p = a.p;
  const auto release = [&](int s) {
    if (a.pair == 2) {
      if (lane < 2) ptx::mbarrier_arrive_at(empty + s, static_cast<uint32_t>(lane));
    } else if (lane == 0) {
      ptx::mbarrier_arrive(empty + s);
    }
  };
  int stage = 0;
  uint32_t phase = 0;
  int32_t d[kWidth / 2];
  for (int32_t u = share.first; u < a.units; u += share.step) {
    const Unit unit = unit_at(a, u);
    const int64_t m0 =
        (static_cast<int64_t>(unit.tokens) * a.pair + share.half) * kTokens + group * 64;
    const int64_t n0 = static_cast<int64_t>(unit.channels) * kWidth;
    const bool active = m0 < p.m;  // else no token of this group exists
    float my_scale[kPerThread], my_bias[kPerThread];
    int32_t my_sum[kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int c = thread + 128 * i;
      const bool inside = c < kWidth && n0 + c < p.n;
      my_scale[i] = inside ? p.weight_scale[n0 + c] : 0.0f;
      my_bias[i] = inside && p.out.bias ? float_at(p.out.dtype, p.out.bias, n0 + c) : 0.0f;
      my_sum[i] = inside && p.x_zeros ? p.weight_sum[n0 + c] : 0;
    }
    int previous = -1;
    for (int32_t k = share.k_begin; k < share.k_end; ++k) {
      ptx::mbarrier_wait(full + stage, phase);
      if (active) {
        const uint32_t x_at = stages + stage * T::kStageBytes;
        const uint64_t xd = ptx::slab_descriptor(x_at + group * 64 * kStepBytes, 0);
        const uint64_t wd = ptx::slab_descriptor(x_at + T::kXBytes, 0);
        ptx::hold(d);
        ptx::wgmma_fence();
#pragma unroll
        for (int i = 0; i < kStepBytes / 32; ++i)
          ptx::wgmma_s8<kWidth>(d, xd + 2 * i, wd + 2 * i, k > share.k_begin || i > 0);
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
      }
      if (previous >= 0) release(previous);
      previous = stage;
      if (++stage == T::kStages) stage = 0, phase ^= 1;
    }
    ptx::wgmma_wait<0>();
    ptx::hold(d);
    release(previous);
    int begin = 0, end = kBlocks;
    if (a.split > 1) {
      const auto rank = static_cast<int>(cluster_rank());
      begin = rank * kBlocks / a.split, end = (rank + 1) * kBlocks / a.split;
      add_other_sums<kWidth>(d, stages, a.split, active, begin, end);
    }
    if (!active) continue;
    ptx::named_sync(1 + group, 128);  // the last tile's vectors are read
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int c = thread + 128 * i;
      if (c < kWidth) scale[c] = my_scale[i], bias[c] = my_bias[i], sums[c] = my_sum[i];
    }
    ptx::named_sync(1 + group, 128);
    if (p.x_zeros)
      finish<kWidth, true>(a, d, m0, n0, scale, bias, sums, begin, end);
    else
      finish<kWidth, false>(a, d, m0, n0, scale, bias, sums, begin, end);
  }
}

template <int kWidth>
__global__ void __launch_bounds__(kThreads, 1) w8a8_kernel(const __grid_constant__ Launch a) {
  using T = Tile<kWidth>;
  extern __shared__ uint8_t raw[];
  // The same offset in every CTA of a cluster: the dynamic part starts at the same address.
  const uint32_t base = ptx::shared_address(raw), stages = (base + 1023) & ~1023u;
  uint8_t* aligned = raw + (stages - base);
  auto* vectors = reinterpret_cast<float*>(aligned + T::kStages * T::kStageBytes);
  auto* full = reinterpret_cast<uint64_t*>(aligned + T::kStages * T::kStageBytes + T::kVectorBytes);
  uint64_t* empty = full + T::kStages;
  const bool cluster = a.pair * a.split > 1;
  if (threadIdx.x == 0) {
    ptx::tma_prefetch(&a.x_map);
    ptx::tma_prefetch(&a.w_map);
    for (int s = 0; s < T::kStages; ++s) {
      ptx::mbarrier_init(full + s, 1);
      ptx::mbarrier_init(empty + s, 8 * static_cast<uint32_t>(a.pair));
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (cluster) cluster_sync_shared();  // barriers exist before anybody arrives at them
  grid_launch_dependents();
  const Share share = share_of(a);
  if (threadIdx.x < 128) {
    ptx::registers_give<40>();
    if (threadIdx.x == 0) produce<kWidth>(a, share, stages, full, empty);
    if (a.split > 1) cluster_sync_shared();  // the one of add_other_sums
  } else {
    ptx::registers_take<232>();
    grid_wait();
    consume<kWidth>(a, share, stages, vectors, full, empty);
  }
  if (cluster) cluster_sync_shared();  // nobody leaves while another still needs its memory
}

template <int kWidth>
int launch_width(const cpu::Int8Params& p, const W8a8Choice& choice, void* stream) {
  using T = Tile<kWidth>;
  Launch a{};
  a.p = p;
  a.pair = choice.pair;
  a.split = choice.split;
  a.k_steps = static_cast<int32_t>(ceil_div(p.k, kStepBytes));
  a.token_units = static_cast<int32_t>(ceil_div(p.m, kTokens * a.pair));
  a.channel_tiles = static_cast<int32_t>(ceil_div(p.n, kWidth));
  a.units = a.token_units * a.channel_tiles;
  a.packs = packs_fit(p.out.data, 16, 1, {p.m > 1 ? p.out.stride * dtype_size(p.out.dtype) : 0});
  int error = code_map(a.x_map, p.x, p.m, p.k, p.x_stride, kTokens);
  if (error == cudaSuccess)
    error = code_map(a.w_map, p.weight, p.n, p.k, p.weight_stride, kWidth / 2);
  if (error != cudaSuccess) return error;
  const int ctas = a.pair * a.split, clusters = device_facts().sms / ctas;
  const int32_t used = a.split > 1 || a.units < clusters ? a.units : clusters;
  return launch_clusters(ctas, w8a8_kernel<kWidth>, static_cast<unsigned>(used * ctas), kThreads,
                         T::kSharedBytes, stream, a);
}

}  // namespace

int w8a8_sm90(const cpu::Int8Params& p, const W8a8Choice& choice, void* stream) {
  switch (choice.width) {
    case 64:
      return launch_width<64>(p, choice, stream);
    case 128:
      return launch_width<128>(p, choice, stream);
    case 192:
      return launch_width<192>(p, choice, stream);
    default:
      return launch_width<256>(p, choice, stream);
  }
}

}  // namespace fastinfer::cuda
