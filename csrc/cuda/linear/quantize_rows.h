// Launcher of quantize_per_token; parameters and meaning as in csrc/cpu/quantize.h. `rows` > 0.
// Returns a cudaError_t.
#pragma once

#include "../../cpu/quantize.h"

namespace fastinfer::cuda {

int quantize_rows(const cpu::QuantizeRowsParams& p, int64_t rows, void* stream);

}  // namespace fastinfer::cuda
