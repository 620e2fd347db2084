// What csrc/ops needs to know of the CUDA side without including a CUDA header: launchers take raw
// pointers, sizes and an opaque stream, and return a cudaError_t as int.
#pragma once

#include <cstdint>

namespace fastinfer::cuda {

const char* error_text(int error);
const char* toolkit_version();  // "13.0"
int runtime_version();          // 13000
int driver_version();           // 0 when there is no driver

// Writes __CUDA_ARCH__ of the code that runs (900 on a Hopper GPU for both; the sm_90a one runs
// on 9.0 only) to *out.
int launch_probe_portable(int32_t* out, void* stream);
int launch_probe_sm90a(int32_t* out, void* stream);

}  // namespace fastinfer::cuda
