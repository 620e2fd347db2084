#include "flash_instances.h"
#include "flash_portable.cuh"

namespace fastinfer::cuda::flash {

int portable_f16_any(const FlashAttentionParams& p, void* stream) {
  using T = __half;
  if (p.head_dim <= 64) return launch_portable<T, 64, true>(p, stream);
  if (p.head_dim <= 128) return launch_portable<T, 128, true>(p, stream);
  return launch_portable<T, 256, true>(p, stream);
}

}  // namespace fastinfer::cuda::flash
