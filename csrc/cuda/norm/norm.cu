// rms_norm and fused_add_rms_norm: see norm.cuh.
#include "norm.h"

#include "norm_rows.cuh"

namespace fastinfer::cuda {

int rms_norm(const cpu::RmsNormParams& p, int64_t rows, void* stream) {
  return launch_norm<false>({p, nullptr, nullptr, nullptr}, rows, stream);
}

}  // namespace fastinfer::cuda
