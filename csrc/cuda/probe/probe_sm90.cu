// The Hopper half of the probe: files named *_sm90.cu are compiled for sm_90a only.
#include "../common/launch.h"
#include "probe.cuh"

namespace fastinfer::cuda {

int launch_probe_sm90a(int32_t* out, void* stream) {
  probe_kernel<90><<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(out);
  return cudaGetLastError();
}

}  // namespace fastinfer::cuda
