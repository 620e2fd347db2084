// swap_blocks where the host side lies in long stretches: the link is fastest with few large
// copies, the blocks of the device are scattered, so they pass through a dense buffer on the
// device. All on the caller's stream:
//
//   from the host   one large copy per stretch -> a kernel scatters the buffer
//   to the host     a kernel gathers into the buffer -> one large copy per stretch
//
// While the kernel moves the buffer the copy engine has nothing to do. So the kernel also moves the
// last few blocks, straight from or to the host (`direct`), and the link stays busy.
#include "region.cuh"

namespace fastinfer::cuda {
namespace {

constexpr int kPairs = 448;  // of a launch
constexpr unsigned kDirectCtas = 32;

struct StagedParams {
  Region region;
  char *device, *staging, *host;
  int64_t device_block, host_block;
  Divisor chunks;       // per block
  int32_t first_place;  // in the buffer
  int32_t staged, pairs, direct_ctas;
  bool into_host;
  int32_t ids[kPairs][2];  // on the device, on the host; those in the buffer first
};
static_assert(sizeof(StagedParams) <= 4096, "kernel parameters beyond 4 KB need newer drivers");

__global__ void __launch_bounds__(kCopyThreads)
    staged_kernel(const __grid_constant__ StagedParams p) {
  grid_wait();
  const bool direct = blockIdx.x < static_cast<unsigned>(p.direct_ctas);
  const uint32_t first = direct ? p.staged : 0;
  const uint32_t items = (direct ? p.pairs - p.staged : p.staged) * p.chunks.value;
  const uint32_t ctas = direct ? p.direct_ctas : gridDim.x - p.direct_ctas;
  for (uint32_t item = direct ? blockIdx.x : blockIdx.x - p.direct_ctas; item < items;
       item += ctas) {
    uint32_t chunk;
    const uint32_t pair = first + p.chunks(item, chunk);
    char* device = p.device + p.ids[pair][0] * p.device_block;
    char* dense = direct ? p.host + p.ids[pair][1] * p.host_block
                         : p.staging + (p.first_place + pair) * p.host_block;
    if (p.into_host) {
      copy_chunk(p.region, device, dense, chunk);
    } else {
      copy_chunk(p.region, dense, device, chunk);
    }
  }
}

// Pairs that are moved directly: the link carries some 3.5 % of the bytes while a kernel moves all
// of them on the device. (H100, PCIe 5.)
constexpr int64_t direct_pairs(int64_t pairs) { return (pairs * 35 + 999) / 1000; }

static_assert(direct_pairs(256) == 9 && direct_pairs(1) == 1, "some, never more than there are");

}  // namespace

int launch_staged_swap(const CopyShape& shape, int64_t device_block, int64_t host_block,
                       char* device, char* host, bool into_host, bool reachable,
                       const int64_t* device_ids, const int64_t* host_ids, int64_t pairs,
                       char* staging, void* stream) {
  const int64_t direct = reachable ? direct_pairs(pairs) : 0, staged = pairs - direct;
  const auto move_buffer = [&] {
    const int64_t launches = ceil_div(pairs, kPairs);
    StagedParams p{};
    p.region = region_of(
        shape, bits_of(device) | bits_of(staging) | bits_of(host) | device_block | host_block);
    const int64_t chunks = ceil_div(p.region.units, kCopyChunk);
    p.device = device, p.staging = staging, p.host = host;
    p.device_block = device_block, p.host_block = host_block;
    p.chunks = Divisor(chunks), p.into_host = into_host;
    for (int64_t n = 0; n < launches; ++n) {  // each with its share of both kinds
      const int64_t from = staged * n / launches, to = staged * (n + 1) / launches;
      const int64_t tail = staged + direct * n / launches,
                    end = staged + direct * (n + 1) / launches;
      p.first_place = static_cast<int32_t>(from);
      p.staged = static_cast<int32_t>(to - from);
      p.pairs = static_cast<int32_t>(to - from + end - tail);
      for (int64_t j = 0; j < p.pairs; ++j) {
        const int64_t i = j < p.staged ? from + j : tail + j - p.staged;
        p.ids[j][0] = static_cast<int32_t>(device_ids[i]);
        p.ids[j][1] = static_cast<int32_t>(host_ids[i]);
      }
      p.direct_ctas = end > tail ? kDirectCtas : 0;
      const int64_t items = p.staged * chunks, most = 3 * device_facts().sms;
      const auto ctas = static_cast<unsigned>(items < most ? items : most);
      const int error =
          launch(staged_kernel, p.direct_ctas + (ctas ? ctas : 1), kCopyThreads, 0, stream, p);
      if (error) return error;
    }
    return 0;
  };
  int error = into_host ? move_buffer() : 0;
  for (int64_t i = 0, n; i < staged && !error; i += n) {
    n = 1;
    while (i + n < staged && host_ids[i + n] == host_ids[i] + n) ++n;
    char* outside = host + host_ids[i] * host_block;
    char* inside = staging + i * host_block;
    error = copy_async(into_host ? outside : inside, into_host ? inside : outside, n * host_block,
                       stream);
  }
  return error || into_host ? error : move_buffer();
}

}  // namespace fastinfer::cuda
