// What csrc/ops needs to know of the CUDA side without including a CUDA header: launchers take raw
// pointers, sizes and an opaque stream, and return a cudaError_t as int.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastinfer::cuda {

const char* error_text(int error);
const char* toolkit_version();  // "13.0"
int runtime_version();          // 13000
int driver_version();           // 0 when there is no driver

// Facts of the current device, asked for once per device.
struct DeviceFacts {
  int sms;
  int64_t l2_bytes;
  int shared_bytes;        // that a block can have
  int compute_capability;  // 90 for 9.0
};
const DeviceFacts& device_facts();

// FASTINFER_FORCE_ARCH=80: the portable kernels (and the software fp8 conversion of sm_80) also
// where newer ones exist. Read at every call, so that a test can switch it.
bool force_portable();

// Programmatic dependent launch of the calling thread's launches: off unless the engine, which
// knows what runs before and after, turns it on. Returns the previous state.
bool set_programmatic_launch(bool on);
bool programmatic_launch();

// Raises a kernel's limit of dynamic shared memory on the current device, where it is lower.
int allow_shared(const void* kernel, size_t bytes);

// Copies to the host and waits for it: for FASTINFER_VALIDATE=1, never on a normal path.
int copy_to_host(void* host, const void* device, size_t bytes, void* stream);
// 1 while `stream` is being captured into a graph.
bool is_capturing(void* stream);

// Writes __CUDA_ARCH__ of the code that runs (900 on a Hopper GPU for both; the sm_90a one runs
// on 9.0 only) to *out.
int launch_probe_portable(int32_t* out, void* stream);
int launch_probe_sm90a(int32_t* out, void* stream);

}  // namespace fastinfer::cuda
