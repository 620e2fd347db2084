// w8a8_linear by wgmma (sm_90a): tiles of 128 tokens x kWidth channels, K in steps of 128.
//
// A CTA has two consumer warpgroups of 64 tokens each and a producer whose one thread keeps a ring
// of stages full by TMA: X [128][128 bytes], W [kWidth][128 bytes], 128-byte swizzled. What lies
// outside the matrices arrives as zeros. Three ways to use CTAs:
//   alone      persistent: a CTA walks the tiles in steps of the grid;
//   pair       two CTAs of a cluster take neighbouring token tiles of the same channels, also
//              persistent. Each loads half of the W stage for both (multicast), which halves the
//              reads of W from L2; a stage is free when the consumers of both have read it;
//   split      where tiles are few: the CTAs of a cluster share the K of one tile, leave their sums
//              in shared memory and each finishes a part of the channels.
// Tiles go in bands of kBand rows, so that those under way at one time share X and W.
#include "../common/launch.cuh"
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

// The end goes through shared memory in blocks of 32 channels: a warp's sums [16 tokens][32 + 8],
// the padding keeps eight rows in different banks.
constexpr int kBlock = 32, kPitch = kBlock + 8, kWarpSums = 16 * kPitch;
constexpr int kBlockBytes = 8 * kWarpSums * 4;  // of all consumers

template <int kWidth>
struct Tile {
  static constexpr int kXBytes = kTokens * kStepBytes, kWBytes = kWidth * kStepBytes;
  static constexpr int kStageBytes = kXBytes + kWBytes;
  static constexpr int kStages = 200 * 1024 / kStageBytes;
  static constexpr int kBlocks = kWidth / kBlock;
  // Scales, bias and weight sums of the tile's channels, once per consumer.
  static constexpr int kVectorBytes = 2 * 3 * kWidth * 4;
  static constexpr int kSharedBytes =
      1024 + kStages * kStageBytes + kBlockBytes + kVectorBytes + 2 * kStages * 8;
  static_assert(kSharedBytes <= 227 * 1024, "shared memory of one CTA");
  static_assert(kBlocks * kBlockBytes <= kStages * kStageBytes, "sums of CTAs that share K");
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
  // What there is more of streams through the L2 cache, the rest (and the code) stays there.
  const uint64_t keep = ptx::policy_evict_last(), once = ptx::policy_evict_first();
  const bool x_stays = a.p.m < a.p.n;
  const uint64_t x_policy = x_stays ? keep : once, w_policy = x_stays ? once : keep;
  const auto load_x = [&](int stage, const Unit& unit, int32_t k) {
    ptx::tma_load_2d(stages + stage * T::kStageBytes, &a.x_map, full + stage, k * kStepBytes,
                     (unit.tokens * a.pair + share.half) * kTokens, x_policy);
  };
  const auto load_w = [&](int stage, const Unit& unit, int32_t k) {
    const uint32_t to = stages + stage * T::kStageBytes + T::kXBytes;
    const int32_t n0 = unit.channels * kWidth, half = share.half;
    if (a.pair == 2) {
      ptx::tma_load_2d_multicast(to + half * kHalf * kStepBytes, &a.w_map, full + stage,
                                 k * kStepBytes, n0 + half * kHalf, 3, w_policy);
    } else {
      ptx::tma_load_2d(to, &a.w_map, full + stage, k * kStepBytes, n0, w_policy);
      ptx::tma_load_2d(to + kHalf * kStepBytes, &a.w_map, full + stage, k * kStepBytes, n0 + kHalf,
                       w_policy);
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

// Scale and zero point of the two tokens a lane finishes, 8 apart.
struct Tokens {
  float scale[2];
  int32_t zero[2];
};

// 16 tokens from m0 on x 32 channels from n0 on: sums at `from` (as kPitch says) of every CTA that
// shares K, to memory. `scale`, `bias`, `sums`: of these channels. Not repeated per block of
// channels: this code runs once or a few times per launch, from a cold instruction cache.
__device__ __forceinline__ void finish_block(const Launch& a, int64_t m0, int64_t n0, uint32_t from,
                                             const float* scale, const float* bias,
                                             const int32_t* sums, const Tokens& tokens) {
  const cpu::Int8Params& p = a.p;
  const int lane = static_cast<int>(threadIdx.x) % 32, column = lane % 4 * 8;
  const int64_t n = n0 + column;
  const bool has_bias = p.out.bias != nullptr;
  const DType type = p.out.dtype;
  const uint32_t at = from + (lane / 4 * kPitch + column) * 4;
  constexpr uint32_t kDown = 8 * kPitch * 4;  // to the lane's other token
  uint32_t v[2][8];
  ptx::load_shared(v[0], at);
  ptx::load_shared(v[1], at + kDown);
  for (int c = 1; c < a.split; ++c) {
    const uint32_t other = ptx::address_at(at, (cluster_rank() + c) % a.split);
    uint32_t more[2][8];
    ptx::load_shared_cluster(more[0], other);
    ptx::load_shared_cluster(more[1], other + kDown);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[0][i] += more[0][i], v[1][i] += more[1][i];
  }
  if (p.x_zeros) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const auto sum = static_cast<uint32_t>(sums[column + i]);
      v[0][i] -= sum * static_cast<uint32_t>(tokens.zero[0]);
      v[1][i] -= sum * static_cast<uint32_t>(tokens.zero[1]);
    }
  }
  float y[2][8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float s = scale[column + i];
#pragma unroll
    for (int h = 0; h < 2; ++h)
      y[h][i] = w8a8_value(static_cast<int32_t>(v[h][i]), 0, 0, tokens.scale[h], s, false, 0.0f);
  }
  if (has_bias) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float b = bias[column + i];
      y[0][i] = __fadd_rn(y[0][i], b);
      y[1][i] = __fadd_rn(y[1][i], b);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t m = m0 + lane / 4 + 8 * h, to = m * p.out.stride + n;
    if (m >= p.m) continue;
    if (!a.packs || n + 8 > p.n) {
      // By way of the sums' own place, so that the code is a loop.
#pragma unroll
      for (int i = 0; i < 8; i += 2)
        ptx::store_shared(at + h * kDown + 4 * i, __float_as_int(y[h][i]),
                          __float_as_int(y[h][i + 1]));
#pragma unroll 1
      for (int i = 0; i < 8 && n + i < p.n; ++i)
        store_float(type, p.out.data, to + i, ptx::load_shared_float(at + h * kDown + 4 * i));
    } else if (type == DType::f32) {
      auto* out = reinterpret_cast<float4*>(static_cast<float*>(p.out.data) + to);
      out[0] = make_float4(y[h][0], y[h][1], y[h][2], y[h][3]);
      out[1] = make_float4(y[h][4], y[h][5], y[h][6], y[h][7]);
    } else {
      *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.out.data) + to) =
          make_uint4(pack_pair(type, y[h][0], y[h][1]), pack_pair(type, y[h][2], y[h][3]),
                     pack_pair(type, y[h][4], y[h][5]), pack_pair(type, y[h][6], y[h][7]));
    }
  }
}

// Block `block` of a warp's sums to shared memory.
template <int kWidth>
__device__ __forceinline__ void stage_block(const int32_t (&d)[kWidth / 2], int block,
                                            uint32_t warp_sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const uint32_t to = warp_sums + (lane / 4 * kPitch + lane % 4 * 2) * 4;
#pragma unroll
  for (int b = 0; b < kWidth / kBlock; ++b) {
    if (b != block) continue;  // registers have no index
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        ptx::store_shared(to + (8 * h * kPitch + 8 * j) * 4, d[16 * b + 4 * j + 2 * h],
                          d[16 * b + 4 * j + 2 * h + 1]);
  }
}

template <int kWidth>
__device__ __forceinline__ void consume(const Launch& a, const Share& share, uint32_t stages,
                                        float* vectors, uint64_t* full, uint64_t* empty) {
  using T = Tile<kWidth>;
  constexpr int kPerThread = (kWidth + 127) / 128;
  const int group = static_cast<int>(threadIdx.x) / 128 - 1;
  const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32;
  const uint32_t warp = threadIdx.x / 32 - 4;
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
    Tokens tokens;
    const int64_t warp_m0 = m0 + thread / 32 * 16;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t m = warp_m0 + lane / 4 + 8 * h;
      tokens.scale[h] = m < p.m ? p.x_scale[m] : 0.0f;
      tokens.zero[h] = m < p.m && p.x_zeros ? p.x_zeros[m] : 0;
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
    ptx::named_sync(1 + group, 128);  // the last tile's vectors are read
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int c = thread + 128 * i;
      if (c < kWidth) scale[c] = my_scale[i], bias[c] = my_bias[i], sums[c] = my_sum[i];
    }
    ptx::named_sync(1 + group, 128);
    // CTAs that share K leave all blocks in the ring, which nobody needs any more; else one block
    // after the other passes through the room behind it.
    const bool shared = a.split > 1;
    const uint32_t room = shared ? stages : stages + T::kStages * T::kStageBytes;
    const uint32_t warp_sums = room + warp * (kWarpSums * 4);
    int begin = 0, end = T::kBlocks;
    if (shared) {
      ptx::named_sync(3, 256);  // both groups have read the ring
#pragma unroll 1
      for (int b = 0; active && b < T::kBlocks; ++b)
        stage_block<kWidth>(d, b, warp_sums + b * kBlockBytes);
      cluster_sync_shared();
      const auto rank = static_cast<int>(cluster_rank());
      begin = rank * T::kBlocks / a.split, end = (rank + 1) * T::kBlocks / a.split;
    }
#pragma unroll 1
    for (int b = begin; active && b < end; ++b) {
      if (!shared) {
        stage_block<kWidth>(d, b, warp_sums);
        __syncwarp();
      }
      finish_block(a, warp_m0, n0 + b * kBlock, warp_sums + (shared ? b * kBlockBytes : 0),
                   scale + b * kBlock, bias + b * kBlock, sums + b * kBlock, tokens);
      __syncwarp();
    }
  }
}

template <int kWidth>
__global__ void __launch_bounds__(kThreads, 1) w8a8_kernel(const __grid_constant__ Launch a) {
  using T = Tile<kWidth>;
  extern __shared__ uint8_t raw[];
  // The same offset in every CTA of a cluster: the dynamic part starts at the same address.
  const uint32_t base = ptx::shared_address(raw), stages = (base + 1023) & ~1023u;
  uint8_t* aligned = raw + (stages - base);
  uint8_t* behind = aligned + T::kStages * T::kStageBytes + kBlockBytes;
  auto* vectors = reinterpret_cast<float*>(behind);
  auto* full = reinterpret_cast<uint64_t*>(behind + T::kVectorBytes);
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
    if (a.split > 1) cluster_sync_shared();  // the one before sums are added
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
  return launch_clusters(w8a8_kernel<kWidth>, ctas, static_cast<unsigned>(used * ctas), kThreads,
                         T::kSharedBytes, stream, a);
}

}  // namespace

int w8a8_sm90(const cpu::Int8Params& p, const W8a8Choice& choice, void* stream) {
  const int width = choice.width;
  return width == 64    ? launch_width<64>(p, choice, stream)
         : width == 128 ? launch_width<128>(p, choice, stream)
         : width == 192 ? launch_width<192>(p, choice, stream)
                        : launch_width<256>(p, choice, stream);
}

}  // namespace fastinfer::cuda
