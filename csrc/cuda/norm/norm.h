// Launchers of the norm operators; parameters and meaning as in csrc/cpu/norm.h. `rows` > 0.
// Returns a cudaError_t.
#pragma once

#include "../../cpu/norm.h"

namespace fastinfer::cuda {

int rms_norm(const cpu::RmsNormParams& p, int64_t rows, void* stream);
int rms_norm_quant(const cpu::RmsNormQuantParams& p, int64_t rows, void* stream);

}  // namespace fastinfer::cuda
