#include "flash_instances.h"
#include "flash_sm90.cuh"

namespace fastinfer::cuda::flash {

int sm90_d192_bf16(const FlashAttentionParams& p, void* stream) {
  return launch_sm90<__nv_bfloat16, 192, false>(p, stream);
}

}  // namespace fastinfer::cuda::flash
