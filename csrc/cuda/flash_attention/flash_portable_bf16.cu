#include "flash_instances.h"
#include "flash_portable.cuh"

namespace fastinfer::cuda::flash {

int portable_bf16(const FlashAttentionParams& p, void* stream) {
  using T = __nv_bfloat16;
  if (p.head_dim <= 64) return launch_portable<T, 64, false>(p, stream);
  if (p.head_dim <= 128) return launch_portable<T, 128, false>(p, stream);
  return launch_portable<T, 256, false>(p, stream);
}

}  // namespace fastinfer::cuda::flash
