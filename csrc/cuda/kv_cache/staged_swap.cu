// swap_blocks where the host side lies in long stretches: the link is fastest with few large
// copies, the blocks of the device are scattered, so they pass through a dense buffer on the
// device.
//
//   to the host     gather chunk (side stream) -> one large copy per stretch (caller's stream)
//   from the host   one large copy per stretch (caller's stream) -> scatter chunk (side stream)
//
// The side stream lets the gather of one chunk run under the copy of another; all of it is ordered
// into the caller's stream by events, at the start and at the end.
#include <cuda_runtime.h>

#include <mutex>

#include "../common/launch.h"
#include "kv_cache.h"

namespace fastinfer::cuda {
namespace {

// One per device, kept for the life of the process. While `main` is being captured, `main` itself:
// a stream that all callers share must not become part of one's graph. Also where none can be made.
cudaStream_t side_stream(cudaStream_t main) {
  constexpr int kMaxDevices = 64;
  static cudaStream_t streams[kMaxDevices];
  static std::mutex mutex;
  if (is_capturing(main)) return main;
  int device = 0;
  cudaGetDevice(&device);
  const std::lock_guard<std::mutex> lock(mutex);
  cudaStream_t& s = streams[device < kMaxDevices ? device : kMaxDevices - 1];
  if (!s && cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking) != cudaSuccess) {
    cudaGetLastError();
    s = nullptr;
  }
  return s ? s : main;
}

// Pairs of the first chunk, of two. To the host the gather of the first is waited for, and the copy
// of the first has to hide the gather of the second, which is some 25 times as fast as the link.
// From the host it is the other way round. More chunks cost more: each time the streams wait for
// each other the link idles for about 10 us (H100).
int64_t first_chunk(int64_t pairs, bool into_host) {
  const int64_t small = pairs < 12 ? 1 : pairs / 12;
  return into_host ? small : pairs - small;
}

}  // namespace

int launch_staged_swap(const CopyShape& shape, int64_t device_block, int64_t host_block,
                       char* device, char* host, bool into_host, const int64_t* device_ids,
                       const int64_t* host_ids, int64_t pairs, char* staging, void* stream) {
  const auto main = static_cast<cudaStream_t>(stream), side = side_stream(main);
  int current = 0;
  cudaGetDevice(&current);
  int error = order_streams(main, current, side);
  int64_t places[kMaxSwapPairs];
  // Between the device's blocks and the buffer.
  auto pack = [&](int64_t first, int64_t count) {
    for (int64_t at = 0; at < count && !error; at += kMaxSwapPairs) {
      const int64_t n = count - at < kMaxSwapPairs ? count - at : kMaxSwapPairs;
      for (int64_t j = 0; j < n; ++j) places[j] = first + at + j;
      const int64_t* ids = device_ids + first + at;
      const char* src = into_host ? device : staging;
      char* dst = into_host ? staging : device;
      error = launch_swap_blocks(
          shape, into_host ? device_block : host_block, into_host ? host_block : device_block, &src,
          &dst, 1, into_host ? ids : places, into_host ? places : ids, n, false, side);
    }
  };
  for (int64_t first = 0, count = first_chunk(pairs, into_host); first < pairs && !error;
       first += count, count = pairs - first) {
    if (into_host) {
      pack(first, count);
      if (!error) error = order_streams(side, current, main);
    }
    for (int64_t i = first, n; i < first + count && !error; i += n) {
      n = 1;
      while (i + n < first + count && host_ids[i + n] == host_ids[i] + n) ++n;
      char* outside = host + host_ids[i] * host_block;
      char* inside = staging + i * host_block;
      error = copy_async(into_host ? outside : inside, into_host ? inside : outside, n * host_block,
                         main);
    }
    if (!into_host && !error) {
      error = order_streams(main, current, side);
      if (!error) pack(first, count);
    }
  }
  // Also after an error: the buffer goes back when the caller's stream gets here.
  const int joined = order_streams(side, current, main);
  return error ? error : joined;
}

}  // namespace fastinfer::cuda
