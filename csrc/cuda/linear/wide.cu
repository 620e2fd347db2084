// Choice of the instance for one call.
#include <cuda_runtime.h>

#include "../common/launch.h"
#include "wide.h"
#include "wide_instances.h"

namespace fastinfer::cuda {

int wide_linear(const PackedLinear& p, WideShape shape, void* stream) {
#ifdef FASTINFER_HAVE_SM90A
  if (device_facts().compute_capability != 90) return cudaErrorNoKernelImageForDevice;
  if (p.dtype == DType::f16)
    return p.bits == 4 ? wide::wide_int4_f16(p, shape, stream)
                       : wide::wide_int8_f16(p, shape, stream);
  return p.bits == 4 ? wide::wide_int4_bf16(p, shape, stream)
                     : wide::wide_int8_bf16(p, shape, stream);
#else
  return cudaErrorNoKernelImageForDevice;
#endif
}

}  // namespace fastinfer::cuda
