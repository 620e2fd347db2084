// Launcher of quantize_weight; parameters and meaning as in csrc/cpu/quantize.h, for `rows` rows.
// Never starts the next kernel early. Returns a cudaError_t.
#pragma once

#include "../../cpu/quantize.h"

namespace fastinfer::cuda {

int quantize_weight(const cpu::QuantizeWeightParams& p, int64_t rows, void* stream);

}  // namespace fastinfer::cuda
