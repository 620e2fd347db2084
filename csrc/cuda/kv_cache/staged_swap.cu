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

#include <algorithm>
#include <vector>

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

// Pairs of each chunk, first to last, for copies to the host: the first gather is waited for, so it
// is short. From the host it is the last scatter: the same list backwards.
std::vector<int64_t> chunks_of(int64_t pairs, int64_t block, bool into_host) {
  std::vector<int64_t> chunks;
  for (int64_t bytes = 2 << 20; pairs > 0; bytes = bytes < 16 << 20 ? 2 * bytes : bytes) {
    int64_t n = bytes > block ? bytes / block : 1;
    n = n < pairs ? n : pairs;
    chunks.push_back(n);
    pairs -= n;
  }
  if (!into_host) std::reverse(chunks.begin(), chunks.end());
  return chunks;
}

}  // namespace

int launch_staged_swap(const CopyShape& shape, int64_t device_block, int64_t host_block,
                       char* device, char* host, bool into_host, const int64_t* device_ids,
                       const int64_t* host_ids, int64_t pairs, char* staging, void* stream) {
  const auto main = static_cast<cudaStream_t>(stream), side = side_stream();
  int current = 0;
  cudaGetDevice(&current);
  int error = order_streams(main, current, side);
  int64_t places[kMaxSwapPairs];
  // Between the device's blocks and the buffer. Under a copy only a few CTAs: at full speed they
  // take the memory bandwidth that the copy needs.
  auto pack = [&](int64_t first, int64_t count, bool alone) {
    for (int64_t at = 0; at < count && !error; at += kMaxSwapPairs) {
      const int64_t n = count - at < kMaxSwapPairs ? count - at : kMaxSwapPairs;
      for (int64_t j = 0; j < n; ++j) places[j] = first + at + j;
      const int64_t* ids = device_ids + first + at;
      const char* src = into_host ? device : staging;
      char* dst = into_host ? staging : device;
      error = launch_swap_blocks(
          shape, into_host ? device_block : host_block, into_host ? host_block : device_block, &src,
          &dst, 1, into_host ? ids : places, into_host ? places : ids, n, !alone, side);
    }
  };
  int64_t first = 0;
  for (const int64_t count : chunks_of(pairs, host_block, into_host)) {
    if (into_host && !error) {
      pack(first, count, first == 0);
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
      pack(first, count, first + count == pairs);
    }
    first += count;
  }
  // Also after an error: the buffer goes back when the caller's stream gets here.
  const int joined = order_streams(side, current, main);
  return error ? error : joined;
}

}  // namespace fastinfer::cuda
