// Launcher of the rotary operators; parameters and meaning as in csrc/cpu/rotary.h, and `write` as
// in csrc/cpu/kv_cache.h where the rotated k and v also go to the paged cache (nullptr: they do
// not). tokens > 0. Returns a cudaError_t.
#pragma once

#include "../../cpu/kv_cache.h"
#include "../../cpu/rotary.h"

namespace fastinfer::cuda {

int rotary(const cpu::RotaryParams& p, const cpu::CacheWriteParams* write, int64_t tokens,
           void* stream);

}  // namespace fastinfer::cuda
