// The two things a launch needs from torch: its device made current, and torch's current stream on
// it. The stream comes from libtorch_cuda, which is looked up at the first CUDA call and never
// linked: one library then loads under CPU-only torch too. Compiled only when the build has CUDA.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "common.h"

namespace fastinfer {

// torch's current stream (a cudaStream_t) on `device`.
void* current_stream(int32_t device);

// Makes the tensor's device current for the scope and holds its current stream.
class CudaLaunch {
 public:
  explicit CudaLaunch(const Tensor& t) {
    const int32_t device = t.get_device_index();
    int32_t current = -1;
    // A guard costs several times as much as the question whether one is needed.
    if (aoti_torch_get_current_device_index(&current) != 0 || current != device)
      guard_.emplace(device);
    stream_ = current_stream(device);
  }
  void* stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_;
};

// Launchers return a CUDA error code; 0 is success. Code 209 (no binary for this GPU) is explained
// with the architectures built.
void check_launch(const char* op, int error);

// The elements that an index tensor [n] or [n, m] on the GPU spans, copied to the host:
// data()[i * stride(0) + j * stride(1)] are its values. For FASTINFER_VALIDATE=1: waits for the
// stream, and raises while a graph is captured.
class HostCopy {
 public:
  HostCopy(const char* op, const char* arg, const Tensor& t, void* stream);
  const void* data() const { return bytes_.data(); }

 private:
  std::vector<char> bytes_;
};

}  // namespace fastinfer
