// Buffers of peer_memory.h: allocation, exchange by CUDA IPC handles (raw bytes, carried by the
// caller), release. Plain C functions for ctypes: a group lives longer than any tensor and is made
// before any operator runs. Each returns a cudaError_t, and none leaves an error behind for the
// next caller of cudaGetLastError.
#include "peer_memory.h"

#include <cuda_runtime.h>

#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

namespace fastinfer::cuda {
namespace {

std::mutex mutex;
std::vector<std::unique_ptr<PeerGroup>> groups;

// Makes a device current for the scope.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    cudaGetDevice(&before_);
    error_ = before_ == device ? cudaSuccess : cudaSetDevice(device);
  }
  ~OnDevice() { cudaSetDevice(before_); }
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  cudaError_t error_;
};

int64_t buffer_bytes(const PeerGroup& g) {
  // Whole pages of the driver, so that a handle names this buffer and nothing else.
  constexpr int64_t kPage = int64_t{2} << 20;
  const int64_t bytes = kPeerHeaderBytes + 2 * (g.world + 1) * g.slot_bytes;
  return (bytes + kPage - 1) / kPage * kPage;
}

int done(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

void release(PeerGroup& g) {
  for (int r = 0; r < g.world; ++r)
    if (g.mapped[r]) cudaIpcCloseMemHandle(g.ranks[r]), g.mapped[r] = false, g.ranks[r] = nullptr;
  g.connected = g.world == 1;
}

}  // namespace

PeerGroup* peer_group(int64_t id) {
  const std::lock_guard<std::mutex> lock(mutex);
  return id >= 0 && id < static_cast<int64_t>(groups.size()) ? groups[id].get() : nullptr;
}

}  // namespace fastinfer::cuda

using fastinfer::cuda::PeerGroup;

extern "C" {

// 1 <= world <= kMaxRanks, 0 <= rank < world, slot_bytes > 0 a multiple of 16.
__attribute__((visibility("default"))) int fastinfer_peer_create(int device, int rank, int world,
                                                                 int64_t slot_bytes,
                                                                 int64_t limit_ns, int64_t* id) {
  using namespace fastinfer::cuda;
  const OnDevice on(device);
  cudaError_t error = on.error();
  auto g = std::make_unique<PeerGroup>();
  *g = PeerGroup{device, rank, world,  world == 1, slot_bytes, static_cast<uint64_t>(limit_ns),
                 {},     {},   nullptr};
  char* own = nullptr;
  if (error == cudaSuccess) error = cudaMalloc(&own, buffer_bytes(*g));
  if (error == cudaSuccess) error = cudaMemset(own, 0xFF, buffer_bytes(*g));
  if (error == cudaSuccess) error = cudaMemset(own, 0, kPeerHeaderBytes);
  if (error == cudaSuccess)
    error = cudaHostAlloc(&g->failed, sizeof(int), cudaHostAllocMapped | cudaHostAllocPortable);
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  if (error != cudaSuccess) {
    if (own) cudaFree(own);
    return done(error);
  }
  *g->failed = 0;
  g->ranks[rank] = own;
  const std::lock_guard<std::mutex> lock(mutex);
  *id = static_cast<int64_t>(groups.size());
  groups.push_back(std::move(g));
  return cudaSuccess;
}

// The 64 bytes with which another process of this host opens the buffer.
__attribute__((visibility("default"))) int fastinfer_peer_handle(int64_t id, void* bytes) {
  using namespace fastinfer::cuda;
  PeerGroup* g = peer_group(id);
  if (!g) return cudaErrorInvalidResourceHandle;
  const OnDevice on(g->device);
  cudaIpcMemHandle_t handle;
  const cudaError_t error = cudaIpcGetMemHandle(&handle, g->ranks[g->rank]);
  if (error == cudaSuccess) std::memcpy(bytes, &handle, sizeof(handle));
  return done(error);
}

// `handles`: those of all ranks, in order; the own one is not looked at.
__attribute__((visibility("default"))) int fastinfer_peer_connect(int64_t id, const void* handles) {
  using namespace fastinfer::cuda;
  PeerGroup* g = peer_group(id);
  if (!g) return cudaErrorInvalidResourceHandle;
  const OnDevice on(g->device);
  cudaError_t error = on.error();
  for (int r = 0; r < g->world && error == cudaSuccess; ++r) {
    if (r == g->rank) continue;
    cudaIpcMemHandle_t handle;
    std::memcpy(&handle, static_cast<const char*>(handles) + r * sizeof(handle), sizeof(handle));
    void* mapped = nullptr;
    error = cudaIpcOpenMemHandle(&mapped, handle, cudaIpcMemLazyEnablePeerAccess);
    if (error == cudaSuccess) g->ranks[r] = static_cast<char*>(mapped), g->mapped[r] = true;
  }
  if (error != cudaSuccess) release(*g);
  g->connected = error == cudaSuccess;
  return done(error);
}

// Ranks that share this process: groups ids[0..world) on one device or on several.
__attribute__((visibility("default"))) int fastinfer_peer_connect_local(const int64_t* ids,
                                                                        int world) {
  using namespace fastinfer::cuda;
  PeerGroup* g[kMaxRanks] = {};
  if (world > kMaxRanks) return cudaErrorInvalidValue;
  for (int r = 0; r < world; ++r) {
    g[r] = peer_group(ids[r]);
    if (!g[r] || g[r]->rank != r || g[r]->world != world) return cudaErrorInvalidResourceHandle;
  }
  for (int r = 0; r < world; ++r) {
    const OnDevice on(g[r]->device);
    for (int p = 0; p < world; ++p) {
      if (g[p]->device != g[r]->device) {
        const cudaError_t error = cudaDeviceEnablePeerAccess(g[p]->device, 0);
        if (error != cudaSuccess) cudaGetLastError();
        if (error != cudaSuccess && error != cudaErrorPeerAccessAlreadyEnabled) return error;
      }
      g[r]->ranks[p] = g[p]->ranks[p];
    }
    g[r]->connected = true;
  }
  return cudaSuccess;
}

// Where the GPU writes 1 once a wait of this rank has run into its time limit, and where the host
// writes any other number to end all waits: host memory, valid until the buffer is freed.
__attribute__((visibility("default"))) int* fastinfer_peer_failed(int64_t id) {
  PeerGroup* g = fastinfer::cuda::peer_group(id);
  return g ? g->failed : nullptr;
}

// Gives back what is mapped of the others. The GPU must be idle.
__attribute__((visibility("default"))) int fastinfer_peer_disconnect(int64_t id) {
  using namespace fastinfer::cuda;
  PeerGroup* g = peer_group(id);
  if (!g) return cudaErrorInvalidResourceHandle;
  const OnDevice on(g->device);
  release(*g);
  g->connected = false;
  return done(cudaSuccess);
}

// Frees the own buffer, which nobody may have mapped any more. The number is not used again.
__attribute__((visibility("default"))) int fastinfer_peer_free(int64_t id) {
  using namespace fastinfer::cuda;
  PeerGroup* g = peer_group(id);
  if (!g) return cudaErrorInvalidResourceHandle;
  const OnDevice on(g->device);
  release(*g);
  cudaError_t error = cudaFree(g->ranks[g->rank]);
  const cudaError_t host = cudaFreeHost(g->failed);
  if (error == cudaSuccess) error = host;
  const std::lock_guard<std::mutex> lock(mutex);
  groups[id].reset();
  return done(error);
}

__attribute__((visibility("default"))) const char* fastinfer_cuda_error_text(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // extern "C"
