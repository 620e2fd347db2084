// Choice of the kernel for one call.
#include "../common/launch.h"
#include "flash_instances.h"

namespace fastinfer::cuda {

int launch_flash_attention(const FlashAttentionParams& p, void* stream) {
  // Also 16-bit tensors whose rows cannot be moved in 16-byte pieces.
  const bool any = dtype_size(p.kv_dtype) == 1 ||
                   !aligned16(p.q, {p.q_batch, p.q_token, p.q_head}) ||
                   !aligned16(p.k.data, {p.k.page, p.k.token, p.k.head}) ||
                   !aligned16(p.v.data, {p.v.page, p.v.token, p.v.head});
  if (p.dtype == DType::f16)
    return any ? flash::portable_f16_any(p, stream) : flash::portable_f16(p, stream);
  return any ? flash::portable_bf16_any(p, stream) : flash::portable_bf16(p, stream);
}

}  // namespace fastinfer::cuda
