// CUDA runtime facts behind plain C++ functions.
#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "launch.h"

namespace fastinfer::cuda {

#define FI_TEXT2(x) #x
#define FI_TEXT(x) FI_TEXT2(x)

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

const char* toolkit_version() {
  return FI_TEXT(__CUDACC_VER_MAJOR__) "." FI_TEXT(__CUDACC_VER_MINOR__);
}

int runtime_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

const DeviceFacts& device_facts() {
  constexpr int kMaxDevices = 64;
  // Two threads that ask at the same time write the same values.
  static DeviceFacts facts[kMaxDevices];
  int device = 0;
  cudaGetDevice(&device);
  DeviceFacts& f = facts[device < kMaxDevices ? device : kMaxDevices - 1];
  if (f.sms == 0) {
    int major = 0, minor = 0, l2 = 0, sms = 1, shared = 48 * 1024;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device);
    cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    f.l2_bytes = l2;
    f.shared_bytes = shared;
    f.compute_capability = 10 * major + minor;
    f.sms = sms;
  }
  return f;
}

bool force_portable() {
  const char* v = std::getenv("FASTINFER_FORCE_ARCH");
  return v && std::strcmp(v, "80") == 0;
}

namespace {
thread_local bool programmatic = false;
}

bool set_programmatic_launch(bool on) {
  const bool before = programmatic;
  programmatic = on;
  return before;
}

bool programmatic_launch() { return programmatic; }

int allow_shared(const void* kernel, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, size_t> limits;
  int device = 0;
  cudaGetDevice(&device);
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& limit = limits[{device, kernel}];
  if (limit >= bytes) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess) limit = bytes;
  return error;
}

int copy_to_host(void* host, const void* device, size_t bytes, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, s);
  return error != cudaSuccess ? error : cudaStreamSynchronize(s);
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const auto error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  return error == cudaSuccess && status != cudaStreamCaptureStatusNone;
}

}  // namespace fastinfer::cuda
