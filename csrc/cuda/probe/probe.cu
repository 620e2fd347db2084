// The portable half of the probe: compiled for sm_80, sm_90a and as PTX for newer parts.
#include "../common/launch.h"
#include "probe.cuh"

namespace fastinfer::cuda {

int launch_probe_portable(int32_t* out, void* stream) {
  probe_kernel<80><<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(out);
  return cudaGetLastError();
}

}  // namespace fastinfer::cuda
