// rms_norm_quant: see norm.cuh.
#include "norm.h"
#include "norm_rows.cuh"

namespace fastinfer::cuda {

int rms_norm_quant(const cpu::RmsNormQuantParams& p, int64_t rows, void* stream) {
  return launch_norm<true>(p, rows, stream);
}

}  // namespace fastinfer::cuda
