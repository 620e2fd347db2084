// Launch of the direct kernels. Instances: x in bytes; bf16 and fp16.
#include "direct.cuh"
#include "direct_bytes.cuh"
#include "skinny_launch.cuh"

namespace fastinfer::cuda {
namespace {

using DirectKernel = void (*)(SkinnyParams);

bool in_bytes(const PackedLinear& p) { return p.m <= kByteTokens && p.k <= kByteColumns; }

DirectKernel kernel_of(const PackedLinear& p) {
  return in_bytes(p)              ? byte_kernel<kDirectStrips>
         : p.dtype == DType::bf16 ? direct_kernel<true, kDirectStrips>
                                  : direct_kernel<false, kDirectStrips>;
}

// Clusters of 1, 2, 4, 8 CTAs that run at the same time, one CTA per multiprocessor: the same for
// all instances.
void most_teams(int (&most)[4], DirectKernel kernel) {
  static int known[64][4];
  int device = 0;
  cudaGetDevice(&device);
  int(&k)[4] = known[device < 64 ? device : 63];
  const DeviceFacts& facts = device_facts();
  if (k[0] == 0) count_clusters(k, kernel, 32 * kDirectWarps);
  const bool clusters =
      facts.compute_capability >= 90 && facts.compute_capability < 100 && !force_portable();
  for (int i = 0; i < 4; ++i) most[i] = i == 0 || clusters ? k[i] : 0;
}

DirectSplit split_of(const PackedLinear& p) {
  int most[4];
  most_teams(most, kernel_of(p));
  const int room =
      device_facts().shared_bytes < kMaxShared ? device_facts().shared_bytes : kMaxShared;
  return choose_direct_split(p.n, p.k, static_cast<int>(p.m), room, most, in_bytes(p));
}

}  // namespace

bool direct_fits(const PackedLinear& p) {
  if (p.batch_invariant || p.m > kDirectTokens || p.m == 0 || p.n == 0 || p.k == 0) return false;
  if (p.perm || !packs_fit(p.x, 0, 2, {p.x_stride})) return false;
  if (p.zeros && p.zero_dtype != DType::u8) return false;
  if (p.groups > 1 && p.group_columns % 128 != 0) return false;
  // Offsets of scales have 32 bits.
  if ((p.n + 63) / 64 * 64 * p.groups > UINT32_MAX) return false;
  return split_of(p).teams > 0;
}

int direct_linear(const PackedLinear& q, void* stream) {
  const DirectSplit split = split_of(q);
  SkinnyParams p = skinny_params<4, false>(q);
  p.x = q.x, p.out = q.out, p.m = static_cast<int>(q.m);
  p.steps = (p.k + 63) / 64, p.tiles = (p.n + 63) / 64;
  p.rank_shift = split.rank_shift, p.ranks = 1 << split.rank_shift;
  p.row_shift = split.row_shift, p.teams = split.teams, p.x_pitch = split.x_pitch;
  const int strips = (p.n + 15) / 16;
  p.deal.full = strips / p.teams, p.deal.rest = strips % p.teams;
  p.slice = ((p.k + 127) / 128 + p.ranks - 1) >> p.rank_shift;  // pairs, at most
  p.x_half = q.dtype == DType::f16;
  p.weights_first = programmatic_launch();
  const DirectKernel kernel = kernel_of(q);
  return launch_clusters(kernel, p.ranks, dim3(static_cast<unsigned>(p.teams << p.rank_shift)),
                         dim3(32 * kDirectWarps), split.bytes, stream, p);
}

}  // namespace fastinfer::cuda
