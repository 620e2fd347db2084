#include "wide_instances.h"
#include "wide_sm90.cuh"

namespace fastinfer::cuda::wide {

int wide_int8_bf16(const PackedLinear& p, WideShape shape, void* stream) {
  return launch_shape<__nv_bfloat16, 8>(p, shape, stream);
}

}  // namespace fastinfer::cuda::wide
