// Host side of the skinny kernel: split, shared memory, launch. One object per width of W.
#pragma once

#include "../common/vec.cuh"
#include "skinny.cuh"
#include "skinny.h"

namespace fastinfer::cuda {

constexpr int kMaxShared = 227 * 1024;
constexpr int64_t kTicketBytes = 64 * 1024;  // one counter per 16 rows of W

// An instance: strips per tile and warp, stages of the ring, warps of a CTA (8: two CTAs share a
// multiprocessor).
struct SkinnyInstance {
  void (*kernel)(SkinnyParams);
  int bits, tiles, strips, stages, warps;

  int rows() const { return 16 * strips; }
  int x_pad() const { return bits == 16 ? 32 : 8; }
};
template <bool kBf16, int kBits, int kTiles, int kStrips, bool kGeneric, int kStages, int kWarps>
SkinnyInstance skinny_instance() {
  return {skinny_kernel<kBf16, kBits, kTiles, kStrips, kGeneric, kStages, kWarps>,
          kBits,
          kTiles,
          kStrips,
          kStages,
          kWarps};
}

// The instance for m tokens. Generic: slots hold up to 8 groups' scales and zeros.
template <bool kBf16, int kBits, bool kGeneric>
SkinnyInstance skinny_instance_for(int64_t m) {
  if constexpr (kGeneric) {
    return skinny_instance<kBf16, kBits, 2, 2, true, kBits == 4 ? 3 : 2, 16>();
  } else if constexpr (kBits == 4) {
    return skinny_instance<kBf16, 4, 2, 2, false, 3, 16>();  // few tokens: direct.cuh
  } else if constexpr (kBits == 8) {
    return m <= 8 ? skinny_instance<kBf16, 8, 1, 2, false, 3, 16>()
                  : skinny_instance<kBf16, 8, 2, 2, false, 3, 16>();
  } else {
    return skinny_instance<kBf16, 16, 2, 1, false, 3, 16>();
  }
}

// Clusters of 1, 2, 4, 8 CTAs of one CTA per multiprocessor that run at the same time.
template <class... Params>
void count_clusters(int (&count)[4], void (*kernel)(Params...), int threads) {
  const DeviceFacts& facts = device_facts();
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxShared);
  for (int i = 1; i < 4; ++i) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(facts.sms >> i << i);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = kMaxShared;
    cudaLaunchAttribute attribute[1];
    attribute[0].id = cudaLaunchAttributeClusterDimension;
    attribute[0].val.clusterDim = {1u << i, 1, 1};
    config.attrs = attribute;
    config.numAttrs = 1;
    int clusters = 0;
    count[i] =
        cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess ? clusters : 0;
  }
  cudaGetLastError();  // a size this GPU does not have is no error of ours
  count[0] = facts.sms;
}
inline void skinny_teams(int (&most)[4], const SkinnyInstance& instance) {
  static int known[64][4];
  int device = 0;
  cudaGetDevice(&device);
  int(&k)[4] = known[device < 64 ? device : 63];
  if (k[0] == 0) count_clusters(k, instance.kernel, 512);
  for (int i = 0; i < 4; ++i) most[i] = k[i];
}

struct SkinnyPlan {
  SkinnySplit split;
  bool clustered;
  int row_shift;
};

inline int skinny_room(const SkinnyInstance& instance) {
  const int most =
      device_facts().shared_bytes < kMaxShared ? device_facts().shared_bytes : kMaxShared;
  return instance.warps == 16 ? most : (most - 1024) / 2;
}

inline SkinnyPlan plan_skinny(const SkinnyInstance& instance, int64_t n, int64_t k, int tokens,
                              int slot_bytes) {
  const DeviceFacts& facts = device_facts();
  const bool clusters =
      facts.compute_capability >= 90 && facts.compute_capability < 100 && !force_portable();
  int most[4];
  if (clusters) {
    skinny_teams(most, instance);
  } else {
    for (int i = 0; i < 4; ++i) most[i] = instance.bits == 16 && i > 0 ? 0 : facts.sms >> i;
  }
  if (instance.warps == 8) most[0] *= 2, most[1] = most[2] = most[3] = 0;
  const SkinnyShared rest = skinny_shared(tokens, 0, instance.warps, instance.stages, slot_bytes,
                                          instance.rows(), instance.tiles, 0);
  const int64_t strips = (n + 15) / 16, steps = (k + 63) / 64;
  SkinnyPlan plan{};
  plan.split = choose_skinny_split(strips, steps, 8 * instance.bits * 16, instance.rows(), tokens,
                                   skinny_room(instance) - rest.bytes - 128, most);
  plan.clustered = clusters && plan.split.ranks > 1;
  // Few columns: warps split rows instead, so that each has two pairs of blocks of a tile.
  const bool may = plan.split.ranks == 1 || plan.clustered;
  while (may && plan.row_shift < 2 &&
         plan.split.slice / 2 < 2 * (instance.warps >> plan.row_shift) &&
         strips >= 2 * (int64_t{plan.split.teams} * instance.strips << plan.row_shift))
    ++plan.row_shift;
  return plan;
}

inline int launch_skinny(SkinnyParams p, int tokens, const SkinnyInstance& instance, void* stream) {
  const SkinnyPlan plan = plan_skinny(instance, p.n, p.k, tokens, p.slot_bytes);
  if (plan.split.ranks == 0) return cudaErrorInvalidConfiguration;
  p.steps = static_cast<int>((p.k + 63) / 64);
  p.tiles = static_cast<int>((p.n + 63) / 64);
  const int strips = static_cast<int>((p.n + 15) / 16);
  p.slice = plan.split.slice, p.ranks = plan.split.ranks, p.teams = plan.split.teams;
  while (1 << p.rank_shift < p.ranks) ++p.rank_shift;
  p.row_shift = plan.row_shift;
  p.deal = skinny_deal(strips, p.teams, instance.strips << p.row_shift);
  p.clustered = plan.clustered;
  p.x_pitch = p.slice * 64 + instance.x_pad();
  const SkinnyShared at =
      skinny_shared(p.m, p.x_pitch, instance.warps, instance.stages, p.slot_bytes, instance.rows(),
                    instance.tiles, p.ranks > 1 ? instance.rows() << p.row_shift : 0);
  cudaError_t error = cudaFuncSetAttribute(
      instance.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, skinny_room(instance));
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(p.ranks * p.teams));
  config.blockDim = dim3(static_cast<unsigned>(32 * instance.warps));
  config.dynamicSmemBytes = at.bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute[2];
  if (p.clustered) {
    attribute[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attribute[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(p.ranks), 1, 1};
  }
  p.weights_first = programmatic_launch();
  if (p.weights_first && device_facts().compute_capability >= 90) {
    attribute[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  config.attrs = attribute;
  return cudaLaunchKernelEx(&config, instance.kernel, p);
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
  s.slot_bytes = static_cast<int>((kBits / 2) * 512 + (kGeneric  ? 256 * touched
                                                       : p.zeros ? 256
                                                                 : 128));
  return s;
}

// Tokens per launch: 16, or fewer where x would not fit; 0: not even one.
template <bool kBf16, int kBits, bool kGeneric>
int64_t skinny_token_step(const SkinnyParams& s, int64_t m) {
  for (int64_t step = m < kSkinnyTokens ? m : kSkinnyTokens; step > 0; step /= 2)
    if (plan_skinny(skinny_instance_for<kBf16, kBits, kGeneric>(step), s.n, s.k,
                    static_cast<int>(step), s.slot_bytes)
            .split.ranks > 0)
      return step;
  return 0;
}

template <bool kBf16, int kBits, bool kGeneric>
int run_skinny(const PackedLinear& p, void* stream) {
  SkinnyParams s = skinny_params<kBits, kGeneric>(p);
  // Batch invariant: the split for 16 tokens whatever M is.
  const int64_t step =
      skinny_token_step<kBf16, kBits, kGeneric>(s, p.batch_invariant ? kSkinnyTokens : p.m);
  if (step == 0) return cudaErrorInvalidConfiguration;
  if (p.workspace) {
    s.tickets = static_cast<uint32_t*>(p.workspace);
    s.partial = reinterpret_cast<float*>(static_cast<char*>(p.workspace) + kTicketBytes);
  }
  for (int64_t m0 = 0; m0 < p.m; m0 += step) {
    s.x = static_cast<const char*>(p.x) + m0 * p.x_stride * 2;
    s.out = static_cast<char*>(p.out) + m0 * p.out_stride * 2;
    s.m = static_cast<int>(p.m - m0 < step ? p.m - m0 : step);
    s.x_packs = !p.perm && packs_fit(s.x, 0, 2, {p.x_stride});
    const int planned = p.batch_invariant ? static_cast<int>(step) : s.m;
    const int error =
        launch_skinny(s, planned, skinny_instance_for<kBf16, kBits, kGeneric>(planned), stream);
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
  const int64_t step =
      skinny_token_step<true, kBits, kGeneric>(s, p.batch_invariant ? kSkinnyTokens : p.m);
  if (step == 0) return 0;
  int64_t most = 0;
  const int64_t tail = p.m % step;
  for (int64_t tokens : {step, p.batch_invariant || tail == 0 ? step : tail}) {
    const SkinnyInstance instance = skinny_instance_for<true, kBits, kGeneric>(tokens);
    const SkinnyPlan plan = plan_skinny(instance, p.n, p.k, static_cast<int>(tokens), s.slot_bytes);
    if (plan.split.ranks <= 1 || plan.clustered) continue;
    const int64_t bytes =
        kTicketBytes + (p.n + 15) / 16 * plan.split.ranks * tokens * instance.rows() * 4;
    most = bytes > most ? bytes : most;
  }
  return most;
}

}  // namespace fastinfer::cuda
