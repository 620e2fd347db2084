// swap_blocks where the host side lies in long stretches: the link is fastest with few large
// copies, the blocks of the device are scattered, so they pass through a dense buffer on the
// device.
//
//   to the host     gather chunk (side stream) -> one large copy per stretch (caller's stream)
//   from the host   one large copy per stretch (caller's stream) -> scatter chunk (side stream)
//
// The side stream lets the gather of one chunk run under the copy of another; all of it is ordered
// into the caller's stream by events, at the start and at the end. A single chunk needs no second
// stream.
#include <cuda_runtime.h>

#include "kv_cache.h"

namespace fastinfer::cuda {
namespace {

// One per device, kept for the life of the process.
cudaStream_t side_stream() {
  constexpr int kMaxDevices = 64;
  static cudaStream_t streams[kMaxDevices];
  int device = 0;
  cudaGetDevice(&device);
  cudaStream_t& s = streams[device < kMaxDevices ? device : kMaxDevices - 1];
  if (!s) cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking);
  return s;
}

// Up to this many bytes the events between two streams cost more than they hide.
constexpr int64_t kChunkBytes = 16 << 20;

}  // namespace

int launch_staged_swap(const CopyShape& shape, int64_t device_block, int64_t host_block,
                       char* device, char* host, bool into_host, const int64_t* device_ids,
                       const int64_t* host_ids, int64_t pairs, char* staging, void* stream) {
  const int64_t chunk = kChunkBytes > host_block ? kChunkBytes / host_block : 1;
  const auto main = static_cast<cudaStream_t>(stream), side = pairs <= chunk ? main : side_stream();
  int current = 0;
  cudaGetDevice(&current);
  auto order = [&](cudaStream_t earlier, cudaStream_t later) {
    return earlier == later ? 0 : order_streams(earlier, current, later);
  };
  int error = order(main, side);
  int64_t places[kMaxSwapPairs];
  for (int64_t first = 0; first < pairs && !error; first += chunk) {
    const int64_t count = pairs - first < chunk ? pairs - first : chunk;
    // Between the device's blocks and the buffer; a launch holds so many pairs anyway.
    auto pack = [&] {
      for (int64_t at = 0; at < count && !error; at += kMaxSwapPairs) {
        const int64_t n = count - at < kMaxSwapPairs ? count - at : kMaxSwapPairs;
        for (int64_t j = 0; j < n; ++j) places[j] = first + at + j;
        const int64_t* ids = device_ids + first + at;
        const char* src = into_host ? device : staging;
        char* dst = into_host ? staging : device;
        error = launch_swap_blocks(
            shape, into_host ? device_block : host_block, into_host ? host_block : device_block,
            &src, &dst, 1, into_host ? ids : places, into_host ? places : ids, n, false, side);
      }
    };
    if (into_host) {
      pack();
      if (!error) error = order(side, main);
    }
    for (int64_t i = 0, n; i < count && !error; i += n) {
      n = 1;
      while (i + n < count && host_ids[first + i + n] == host_ids[first + i] + n) ++n;
      char* outside = host + host_ids[first + i] * host_block;
      char* inside = staging + (first + i) * host_block;
      error = copy_async(into_host ? outside : inside, into_host ? inside : outside, n * host_block,
                         main);
    }
    if (!into_host && !error) {
      error = order(main, side);
      if (!error) pack();
    }
  }
  // Also after an error: the buffer goes back when the caller's stream gets here.
  const int joined = order(side, main);
  return error ? error : joined;
}

}  // namespace fastinfer::cuda
