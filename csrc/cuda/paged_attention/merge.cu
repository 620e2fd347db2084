// merge_attn_states: attention over two disjoint sets of keys from the results over each.
//
//   m = max(lse_a, lse_b), w_x = e^(lse_x - m), out = (w_a a + w_b b) / (w_a + w_b), lse = m +
//   ln(w_a + w_b)
//
// A side whose LSE is infinite holds no keys: its output is not read. One warp per row (batch,
// token, head); a thread reads what it writes before writing it, so out may be an input.
#include "../common/launch.cuh"
#include "../common/vec.cuh"
#include "paged_attention.h"

namespace fastinfer::cuda {
namespace {

constexpr int kWarps = 4;

template <class T>
__global__ void __launch_bounds__(32 * kWarps)
    merge_kernel(const __grid_constant__ cpu::MergeStatesParams p, bool packs) {
  constexpr int kPack = Pack<T>::kSize;
  grid_wait();
  grid_launch_dependents();
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= p.batch * p.tokens * p.heads) return;
  const int64_t head = row % p.heads, token = row / p.heads % p.tokens;
  const int64_t batch = row / p.heads / p.tokens;
  auto offset = [&](const int64_t* stride) {
    return batch * stride[0] + token * stride[1] + head * stride[2];
  };
  const float a = p.prefix_lse[offset(p.prefix_lse_stride)];
  const float b = p.suffix_lse[offset(p.suffix_lse_stride)];
  const bool no_a = isinf(a), no_b = isinf(b);
  const float top = no_a ? b : no_b ? a : fmaxf(a, b);
  const float ea = no_a ? 0.0f : no_b ? 1.0f : expf(a - top);
  const float eb = no_b ? 0.0f : no_a ? 1.0f : expf(b - top);
  const float total = ea + eb;
  const float wa = no_a ? 0.0f : ea / total, wb = no_b ? 0.0f : eb / total;
  __syncwarp();  // out_lse may be one of the inputs
  if (p.out_lse && lane == 0)
    p.out_lse[offset(p.out_lse_stride)] = no_a && no_b ? -__builtin_huge_valf()
                                          : no_a       ? b
                                          : no_b       ? a
                                                       : top + logf(total);
  const T* x = static_cast<const T*>(p.prefix) + offset(p.prefix_stride);
  const T* y = static_cast<const T*>(p.suffix) + offset(p.suffix_stride);
  T* out = static_cast<T*>(p.out) + offset(p.out_stride);
  for (int64_t i = lane * kPack; i < p.head_dim; i += 32 * kPack) {
    float u[kPack] = {}, v[kPack] = {};
    if (!no_a) unpack<T>(u, load_pack(x, i, p.head_dim, packs));
    if (!no_b) unpack<T>(v, load_pack(y, i, p.head_dim, packs));
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const float left = no_a ? 0.0f : u[j] * wa;
      const float right = no_b ? 0.0f : v[j] * wb;
      u[j] = left + right;
    }
    store_pack(out, i, p.head_dim, packs, pack_of<T>(u));
  }
}

}  // namespace

int launch_merge_states(const cpu::MergeStatesParams& p, void* stream) {
  const int64_t rows = p.batch * p.tokens * p.heads;
  return with_float(p.dtype, [&](auto t) {
    using T = decltype(t);
    const auto fit = [&](const void* data, const int64_t* s) {
      return packs_fit(data, p.head_dim, sizeof(T), {s[0], s[1], s[2]});
    };
    const bool packs = fit(p.prefix, p.prefix_stride) && fit(p.suffix, p.suffix_stride) &&
                       fit(p.out, p.out_stride);
    return launch(merge_kernel<T>, dim3(static_cast<unsigned>(ceil_div(rows, kWarps))),
                  dim3(32 * kWarps), 0, stream, p, packs);
  });
}

}  // namespace fastinfer::cuda
