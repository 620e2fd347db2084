#include "flash_instances.h"
#include "flash_sm90.cuh"

namespace fastinfer::cuda::flash {

int sm90_d64_bf16(const FlashAttentionParams& p, bool modify, void* stream) {
  return modify ? launch_sm90<__nv_bfloat16, 64, true>(p, stream)
                : launch_sm90<__nv_bfloat16, 64, false>(p, stream);
}

}  // namespace fastinfer::cuda::flash
