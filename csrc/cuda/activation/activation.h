// Launchers of the gated activations; parameters and meaning as in csrc/cpu/activation.h. `rows`
// and inner > 0. Returns a cudaError_t.
#pragma once

#include "../../cpu/activation.h"

namespace fastinfer::cuda {

int gated_activation(const cpu::GatedParams& p, int64_t rows, void* stream);
int silu_and_mul_quant(const cpu::GatedQuantParams& p, int64_t rows, void* stream);

}  // namespace fastinfer::cuda
