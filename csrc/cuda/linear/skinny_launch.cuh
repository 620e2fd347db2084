// Host side of the skinny kernel: split, shared memory, launch. One object per width of W.
#pragma once

#include "../common/vec.cuh"
#include "skinny.cuh"
#include "skinny.h"

namespace fastinfer::cuda {

constexpr int kMaxShared = 227 * 1024;
constexpr int64_t kTicketBytes = 64 * 1024;  // one counter per 16 rows of W

template <int kBits>
constexpr int skinny_strips() {
  return kBits == 16 ? 1 : 2;
}
// Generic: slots hold up to 8 groups' scales and zeros.
template <int kBits, bool kGeneric>
constexpr int skinny_stages() {
  return kBits == 4 ? (kGeneric ? 3 : 5) : (kGeneric ? 2 : 3);
}

using SkinnyKernel = void (*)(SkinnyParams);

// The kernel for m tokens.
template <bool kBf16, int kBits, bool kGeneric>
SkinnyKernel skinny_kernel_for(int64_t m) {
  constexpr int kStages = skinny_stages<kBits, kGeneric>(), kStrips = skinny_strips<kBits>();
  if constexpr (kGeneric) {
    return skinny_kernel<kBf16, kBits, 2, kStrips, true, kStages, 1>;
  } else {
    if (m <= 8) return skinny_kernel<kBf16, kBits, 1, kStrips, false, kStages, 1>;
    if constexpr (kBits == 16) {
      return skinny_kernel<kBf16, kBits, 2, kStrips, false, kStages, 1>;
    } else {
      if (m <= 16) return skinny_kernel<kBf16, kBits, 2, kStrips, false, kStages, 1>;
      return skinny_kernel<kBf16, kBits, 4, kStrips, false, kStages, 1>;
    }
  }
}

// Clusters of 1, 2, 4, 8 CTAs of one CTA per multiprocessor that run at the same time.
inline void skinny_teams(int (&most)[4], const void* kernel) {
  static int known[64][4];
  int device = 0;
  cudaGetDevice(&device);
  int(&k)[4] = known[device < 64 ? device : 63];
  const DeviceFacts& facts = device_facts();
  if (k[0] == 0) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxShared);
    for (int i = 1; i < 4; ++i) {
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(facts.sms >> i << i);
      config.blockDim = dim3(kSkinnyThreads);
      config.dynamicSmemBytes = kMaxShared;
      cudaLaunchAttribute attribute[1];
      attribute[0].id = cudaLaunchAttributeClusterDimension;
      attribute[0].val.clusterDim = {1u << i, 1, 1};
      config.attrs = attribute;
      config.numAttrs = 1;
      int clusters = 0;
      k[i] =
          cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess ? clusters : 0;
    }
    cudaGetLastError();  // a size this GPU does not have is no error of ours
    k[0] = facts.sms;
  }
  for (int i = 0; i < 4; ++i) most[i] = k[i];
}

struct SkinnyPlan {
  SkinnySplit split;
  bool clustered;
};

template <int kBits, bool kGeneric>
SkinnyPlan plan_skinny(int64_t n, int64_t k, int tokens, int slot_bytes, const void* kernel) {
  using Shape = SkinnyShape<kBits, skinny_strips<kBits>()>;
  const DeviceFacts& facts = device_facts();
  const bool clusters =
      facts.compute_capability >= 90 && facts.compute_capability < 100 && !force_portable();
  int most[4];
  if (clusters) {
    skinny_teams(most, kernel);
  } else {
    for (int i = 0; i < 4; ++i) most[i] = kBits == 16 && i > 0 ? 0 : facts.sms >> i;
  }
  const int room = facts.shared_bytes < kMaxShared ? facts.shared_bytes : kMaxShared;
  const SkinnyShared rest = skinny_shared(tokens, 0, skinny_stages<kBits, kGeneric>(), slot_bytes,
                                          Shape::kRows, tokens <= 8 && !kGeneric ? 1 : 2, true);
  const int64_t x_room = room - rest.bytes - 128;
  const SkinnySplit split =
      choose_skinny_split((n + 15) / 16, (k + 63) / 64, 128 * kBits, tokens, x_room, most);
  return {split, clusters && split.ranks > 1};
}

template <int kBits, bool kGeneric>
int launch_skinny(SkinnyParams p, int tokens, SkinnyKernel kernel, void* stream) {
  using Shape = SkinnyShape<kBits, skinny_strips<kBits>()>;
  const int token_tiles = tokens <= 8 && !kGeneric ? 1 : 2;  // 2 stands for 4 as well
  const SkinnyPlan plan = plan_skinny<kBits, kGeneric>(p.n, p.k, tokens, p.slot_bytes,
                                                       reinterpret_cast<const void*>(kernel));
  if (plan.split.ranks == 0) return cudaErrorInvalidConfiguration;
  p.steps = static_cast<int>((p.k + 63) / 64);
  p.tiles = static_cast<int>((p.n + 63) / 64);
  const int strips = static_cast<int>((p.n + 15) / 16);
  p.slice = plan.split.slice, p.ranks = plan.split.ranks, p.teams = plan.split.teams;
  p.deal = skinny_deal(strips, p.teams, skinny_strips<kBits>());
  p.clustered = plan.clustered;
  p.x_pitch = p.slice * 64 + Shape::kXPad;
  const SkinnyShared at = skinny_shared(p.m, p.x_pitch, skinny_stages<kBits, kGeneric>(),
                                        p.slot_bytes, Shape::kRows, token_tiles, p.ranks > 1);
  const int room = device_facts().shared_bytes;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           room < kMaxShared ? room : kMaxShared);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(p.ranks * p.teams));
  config.blockDim = dim3(kSkinnyThreads);
  config.dynamicSmemBytes = at.bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute[2];
  if (p.clustered) {
    attribute[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attribute[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(p.ranks), 1, 1};
  }
  if (programmatic_launch() && device_facts().compute_capability >= 90) {
    attribute[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  config.attrs = attribute;
  return cudaLaunchKernelEx(&config, kernel, p);
}

// ---- packed weights

inline bool skinny_generic(const PackedLinear& p) {
  // The fast kernel takes scales of whole blocks of 64 columns; int4 zero points ride along.
  const bool whole = p.groups <= 1 || p.group_columns % 64 == 0;
  return !whole || (p.zeros && (p.bits == 8 || p.zero_dtype != DType::u8));
}

// Most tokens per launch: as many as the plan for them has room for x.
template <int kBits, bool kGeneric>
SkinnyParams skinny_params(const PackedLinear& p) {
  SkinnyParams s{};
  s.x_stride = p.x_stride, s.perm = p.perm;
  s.w = p.qweight;
  s.scales = p.scales, s.zeros = p.zeros;
  s.scale_dtype = p.scale_dtype, s.zero_dtype = p.zero_dtype;
  s.out_stride = p.out_stride, s.bias = p.bias;
  s.n = static_cast<int>(p.n), s.k = static_cast<int>(p.k);
  s.groups = static_cast<int>(p.groups);
  const int64_t unit = kGeneric ? 8 : 64;
  const int64_t whole = p.k > 0 ? (p.k + 63) / 64 * 64 : 64;
  const int64_t units = (p.groups <= 1 ? whole : p.group_columns) / unit;
  s.group_units = static_cast<int>(units);
  s.group_magic = group_magic(units);
  s.pair = p.groups <= 1 || p.group_columns % 128 == 0;
  // Groups that start inside a block of 64 columns, and one that started before it.
  const int64_t touched = 8 % units == 0 ? 8 / units : 8 / units + 2;
  s.slot_bytes = static_cast<int>(SkinnyShape<kBits, skinny_strips<kBits>()>::kPieces * 512 +
                                  256 * (kGeneric ? touched : 1));
  return s;
}

// Tokens per launch: 32, or fewer where x would not fit; 0: not even 8.
template <bool kBf16, int kBits, bool kGeneric>
int64_t skinny_token_step(const SkinnyParams& s, int64_t n, int64_t k, int64_t m) {
  for (int64_t step = kGeneric ? 16 : m <= 8 ? m : m <= 16 ? 16 : 32; step > 0; step /= 2) {
    const auto kernel = skinny_kernel_for<kBf16, kBits, kGeneric>(step);
    if (plan_skinny<kBits, kGeneric>(n, k, static_cast<int>(step), s.slot_bytes,
                                     reinterpret_cast<const void*>(kernel))
            .split.ranks > 0)
      return step;
  }
  return 0;
}

template <bool kBf16, int kBits, bool kGeneric>
int run_skinny(const PackedLinear& p, void* stream) {
  SkinnyParams s = skinny_params<kBits, kGeneric>(p);
  // Batch invariant: the split for 16 tokens whatever M is.
  const int64_t step =
      skinny_token_step<kBf16, kBits, kGeneric>(s, p.n, p.k, p.batch_invariant ? 16 : p.m);
  if (step == 0) return cudaErrorInvalidConfiguration;
  for (int64_t m0 = 0; m0 < p.m; m0 += step) {
    s.x = static_cast<const char*>(p.x) + m0 * p.x_stride * 2;
    s.out = static_cast<char*>(p.out) + m0 * p.out_stride * 2;
    s.m = static_cast<int>(p.m - m0 < step ? p.m - m0 : step);
    s.x_packs = !p.perm && packs_fit(s.x, 0, 2, {p.x_stride});
    const int planned = p.batch_invariant ? static_cast<int>(step) : s.m;
    if (p.workspace) {
      s.tickets = static_cast<uint32_t*>(p.workspace);
      s.partial = reinterpret_cast<float*>(static_cast<char*>(p.workspace) + kTicketBytes);
    }
    const int error = launch_skinny<kBits, kGeneric>(
        s, planned, skinny_kernel_for<kBf16, kBits, kGeneric>(planned), stream);
    if (error) return error;
  }
  return 0;
}

template <int kBits>
int run_skinny(const PackedLinear& p, void* stream) {
  const bool generic = skinny_generic(p);
  if (p.dtype == DType::bf16)
    return generic ? run_skinny<true, kBits, true>(p, stream)
                   : run_skinny<true, kBits, false>(p, stream);
  return generic ? run_skinny<false, kBits, true>(p, stream)
                 : run_skinny<false, kBits, false>(p, stream);
}

// Bytes of workspace: only where CTAs share tiles without being a cluster.
template <int kBits, bool kGeneric>
int64_t skinny_workspace_of(const PackedLinear& p) {
  const SkinnyParams s = skinny_params<kBits, kGeneric>(p);
  const int64_t m = p.batch_invariant ? 16 : p.m;
  const int64_t step = skinny_token_step<true, kBits, kGeneric>(s, p.n, p.k, m);
  if (step == 0) return 0;
  int64_t most = 0;
  const int64_t tail = p.m % step;
  for (int64_t tokens : {step, p.batch_invariant || tail == 0 ? step : tail}) {
    const auto kernel = skinny_kernel_for<true, kBits, kGeneric>(tokens);
    const SkinnyPlan plan = plan_skinny<kBits, kGeneric>(
        p.n, p.k, static_cast<int>(tokens), s.slot_bytes, reinterpret_cast<const void*>(kernel));
    if (plan.split.ranks <= 1 || plan.clustered) continue;
    const int64_t bytes = kTicketBytes + (p.n + 15) / 16 * plan.split.ranks * tokens *
                                             SkinnyShape<kBits, skinny_strips<kBits>()>::kRows * 4;
    most = bytes > most ? bytes : most;
  }
  return most;
}

}  // namespace fastinfer::cuda
