#include "flash_instances.h"
#include "flash_sm90.cuh"

namespace fastinfer::cuda::flash {

int sm90_d192_f16(const FlashAttentionParams& p, void* stream) {
  return launch_sm90<__half, 192, false>(p, stream);
}

}  // namespace fastinfer::cuda::flash
