// The compiled groups of kernels, one per .cu so that they build in parallel. Each launches the
// instance for p.head_dim.
#pragma once

#include "flash_attention.h"

namespace fastinfer::cuda::flash {

int portable_f16(const FlashAttentionParams& p, void* stream);
int portable_bf16(const FlashAttentionParams& p, void* stream);
int portable_f16_any(const FlashAttentionParams& p, void* stream);
int portable_bf16_any(const FlashAttentionParams& p, void* stream);

}  // namespace fastinfer::cuda::flash
