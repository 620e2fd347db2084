#include "wide_sm90.cuh"
namespace fastinfer::cuda::wide {
int wide_bf16(const PackedLinear& p, WideShape s, void* stream) {
  using T = __nv_bfloat16;
  if (p.bits == 4) {
    if (s.tokens == 64 && s.blocks == 1) return launch_wide<T, 4, 64, 1>(p, s.split, stream);
    if (s.tokens == 64) return launch_wide<T, 4, 64, 2>(p, s.split, stream);
    if (s.tokens == 128) return launch_wide<T, 4, 128, 1>(p, s.split, stream);
    return launch_wide<T, 4, 256, 1>(p, s.split, stream);
  }
  return 801;
}
}  // namespace fastinfer::cuda::wide
