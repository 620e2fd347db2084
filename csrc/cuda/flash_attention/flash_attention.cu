// Choice of the kernel for one call.
#include "../common/launch.h"
#include "flash_choice.h"
#include "flash_instances.h"

namespace fastinfer::cuda {

int launch_flash_attention(const FlashAttentionParams& call, void* stream) {
  FlashAttentionParams p = call;
  p.section = static_cast<int32_t>(
      flash::section_heads(p.batch, p.heads_kv, p.group, p.len_q, p.len_k, p.head_dim,
                           device_facts().l2_bytes, device_facts().sms));
  constexpr float kLog2e = 1.44269504088896f;
  p.inner = p.softcap > 0.0f ? p.scale / p.softcap : p.scale * kLog2e;
  p.outer = p.softcap * kLog2e;
  const bool half = p.dtype == DType::f16;
  switch (flash::choose_kernel(p, device_facts().compute_capability, force_portable())) {
    case flash::Kernel::portable_any:
      return half ? flash::portable_f16_any(p, stream) : flash::portable_bf16_any(p, stream);
#ifdef FASTINFER_HAVE_SM90A
    case flash::Kernel::sm90: {
      // Scores that are not just scale * q . k with a positive scale need another pass.
      const bool modify = p.softcap != 0.0f || p.alibi || !(p.scale > 0.0f);
      switch (modify ? flash::sm90_modify_dim(p.head_dim) : flash::sm90_dim(p.head_dim)) {
        case 64:
          return half ? flash::sm90_d64_f16(p, modify, stream)
                      : flash::sm90_d64_bf16(p, modify, stream);
        case 128:
          return half ? flash::sm90_d128_f16(p, modify, stream)
                      : flash::sm90_d128_bf16(p, modify, stream);
        case 192:
          return half ? flash::sm90_d192_f16(p, stream) : flash::sm90_d192_bf16(p, stream);
        default:
          return half ? flash::sm90_d256_f16(p, modify, stream)
                      : flash::sm90_d256_bf16(p, modify, stream);
      }
    }
#endif
    default:
      return half ? flash::portable_f16(p, stream) : flash::portable_bf16(p, stream);
  }
}

}  // namespace fastinfer::cuda
