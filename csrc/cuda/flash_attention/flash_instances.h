// The compiled groups of kernels, one per .cu so that they build in parallel. Each launches the
// instance for p.head_dim.
#pragma once

#include "flash_attention.h"

namespace fastinfer::cuda::flash {

int portable_f16(const FlashAttentionParams& p, void* stream);
int portable_bf16(const FlashAttentionParams& p, void* stream);
int portable_f16_any(const FlashAttentionParams& p, void* stream);
int portable_bf16_any(const FlashAttentionParams& p, void* stream);

// `modify`: softcap, ALiBi or a scale that is not positive.
int sm90_d64_f16(const FlashAttentionParams& p, bool modify, void* stream);
int sm90_d64_bf16(const FlashAttentionParams& p, bool modify, void* stream);
int sm90_d128_f16(const FlashAttentionParams& p, bool modify, void* stream);
int sm90_d128_bf16(const FlashAttentionParams& p, bool modify, void* stream);
int sm90_d192_f16(const FlashAttentionParams& p, void* stream);
int sm90_d192_bf16(const FlashAttentionParams& p, void* stream);
int sm90_d256_f16(const FlashAttentionParams& p, bool modify, void* stream);
int sm90_d256_bf16(const FlashAttentionParams& p, bool modify, void* stream);

}  // namespace fastinfer::cuda::flash
