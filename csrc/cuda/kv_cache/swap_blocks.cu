// swap_blocks: blocks between a device and the host, or between two places of a device.
//
//   by kernel   reads or writes pinned memory directly: blocks scattered on both sides
//   staged      where the host side lies in long stretches: the link is fastest with few large
//               copies, the blocks of the device are scattered, so they pass through a dense buffer
//               on the device. From the host: one copy per stretch, then a kernel scatters the
//               buffer; to the host: a kernel gathers, then one copy per stretch. While the kernel
//               moves the buffer the copy engine has nothing to do, so the kernel also moves the
//               last few blocks directly, and the link stays busy.
//
// The caches and the pairs, which are on the host, travel by value in the parameters. Work items of
// a part: (cache, pair, chunk). All on the caller's stream. Writes KV, so no early launch.
#include "region.cuh"

namespace fastinfer::cuda {
namespace {

constexpr int kSwapCaches = 64, kFewPairs = 320;
// Parameters beyond 4 KB. A launch that has to wait for the link at its end costs it some 15 us.
constexpr int kManyPairs = CUDART_VERSION >= 12010 ? 2048 : kFewPairs;
constexpr int kUnroll = 4, kChunk = kCopyThreads * kUnroll;
constexpr unsigned kLinkCtas = 64, kDirectCtas = 32;  // 16 KiB in flight each

struct SwapPart {
  uint32_t ctas, items;
  int32_t first_cache, first_pair;
  Divisor pairs;
};
template <int kPairs>
struct SwapParams {
  Region region;
  int64_t src_block, dst_block;
  Divisor chunks;    // per block
  SwapPart part[2];  // the CTAs of the second one come first
  const char* src[kSwapCaches];
  char* dst[kSwapCaches];
  int32_t ids[kPairs][2];
};
static_assert(sizeof(SwapParams<kFewPairs>) <= 4096, "parameters of 4 KB");

template <int kPairs>
__global__ void __launch_bounds__(kCopyThreads)
    swap_blocks_kernel(const __grid_constant__ SwapParams<kPairs> p) {
  grid_wait();
  const bool second = blockIdx.x < p.part[1].ctas;
  const SwapPart& part = p.part[second];
  for (uint32_t item = blockIdx.x - (second ? 0 : p.part[1].ctas); item < part.items;
       item += part.ctas) {
    uint32_t chunk, pair;
    const uint32_t cache = part.first_cache + part.pairs(p.chunks(item, chunk), pair);
    pair += part.first_pair;
    const char* src = p.src[cache] + p.ids[pair][0] * p.src_block;
    char* dst = p.dst[cache] + p.ids[pair][1] * p.dst_block;
    if (src != dst) copy_chunk<kUnroll>(p.region, src, dst, chunk);
  }
}

// ---- host
// Block ids: an array, or first, first + 1, ...
struct Ids {
  const int64_t* at;
  int64_t first;
  int64_t operator[](int64_t i) const { return at ? at[first + i] : first + i; }
};

struct PartOfSwap {
  const char* const* src;
  char* const* dst;
  int64_t caches;
  Ids src_ids, dst_ids;
  int64_t pairs;
  unsigned most_ctas;
};

// One launch; at most kSwapCaches caches and kPairs pairs together.
template <int kPairs>
int launch_parts(const CopyShape& shape, int64_t src_block, int64_t dst_block,
                 const PartOfSwap (&parts)[2], void* stream) {
  SwapParams<kPairs> p;
  int64_t bits = src_block | dst_block;
  int cache = 0, pair = 0;
  for (int n = 0; n < 2; ++n) {
    const PartOfSwap& from = parts[n];
    p.part[n].first_cache = cache, p.part[n].first_pair = pair;
    for (int64_t i = 0; i < from.caches; ++i, ++cache)
      bits |= bits_of(p.src[cache] = from.src[i]) | bits_of(p.dst[cache] = from.dst[i]);
    for (int64_t j = 0; j < from.pairs; ++j, ++pair) {
      p.ids[pair][0] = static_cast<int32_t>(from.src_ids[j]);
      p.ids[pair][1] = static_cast<int32_t>(from.dst_ids[j]);
    }
  }
  p.region = region_of(shape, bits);
  p.src_block = src_block, p.dst_block = dst_block;
  const int64_t chunks = ceil_div(p.region.units, kChunk);
  p.chunks = Divisor(chunks);
  unsigned grid = 0;
  for (int n = 0; n < 2; ++n) {
    const int64_t items = parts[n].caches * parts[n].pairs * chunks;
    p.part[n].pairs = Divisor(parts[n].pairs);
    p.part[n].items = static_cast<uint32_t>(items);
    p.part[n].ctas = static_cast<unsigned>(at_most(items, parts[n].most_ctas));
    grid += p.part[n].ctas;
  }
  return launch(swap_blocks_kernel<kPairs>, grid, kCopyThreads, 0, stream, p);
}

int launch_parts(const CopyShape& shape, int64_t src_block, int64_t dst_block,
                 const PartOfSwap (&parts)[2], void* stream) {
  const bool few = parts[0].pairs + parts[1].pairs <= kFewPairs;
  return (few ? launch_parts<kFewPairs> : launch_parts<kManyPairs>)(shape, src_block, dst_block,
                                                                    parts, stream);
}

// Pairs that a staged swap moves directly: about what the link carries while a kernel moves all of
// them on the device, a little more to the host (H100 and H200, PCIe 5), less the two that would
// outlast it where there are few.
constexpr int64_t direct_pairs(int64_t pairs, bool into_host) {
  const int64_t share = (pairs * (into_host ? 45 : 35) + 999) / 1000;
  return share > 2 ? share - 2 : 1;
}

static_assert(direct_pairs(256, false) == 7 && direct_pairs(1, true) == 1, "some, at most all");

}  // namespace

int launch_swap_blocks(const CopyShape& whole, int64_t src_block, int64_t dst_block,
                       const char* const* src, char* const* dst, int64_t count,
                       const int64_t* src_ids, const int64_t* dst_ids, int64_t pairs,
                       bool over_pcie, void* stream) {
  return for_each_part(whole, 0, 0, [&](const CopyShape& shape, int64_t from, int64_t to) {
    for (int64_t c = 0; c < count; c += kSwapCaches) {
      const int64_t some = at_most(count - c, kSwapCaches);
      const char* a[kSwapCaches];
      char* b[kSwapCaches];
      for (int64_t i = 0; i < some; ++i) a[i] = src[c + i] + from, b[i] = dst[c + i] + to;
      int64_t bytes = shape.run_bytes;
      for (int d = 0; d < shape.dims; ++d) bytes *= shape.size[d];
      const int64_t chunks = ceil_div(bytes, kChunk);  // of a block, if units are bytes
      const int64_t room = at_most(kManyPairs, kMaxItems / (chunks * some));
      const int64_t step = room > 1 ? room : 1;
      for (int64_t first = 0; first < pairs; first += step) {
        const int64_t now = at_most(pairs - first, step);
        const PartOfSwap parts[2] = {{a,
                                      b,
                                      some,
                                      {src_ids, first},
                                      {dst_ids, first},
                                      now,
                                      over_pcie ? kLinkCtas : static_cast<unsigned>(kMaxItems)},
                                     {}};
        const int error = launch_parts(shape, src_block, dst_block, parts, stream);
        if (error) return error;
      }
    }
    return 0;
  });
}

int launch_staged_swap(const CopyShape& shape, int64_t device_block, int64_t host_block,
                       char* device, char* host, bool into_host, bool reachable,
                       const int64_t* device_ids, const int64_t* host_ids, int64_t pairs,
                       char* staging, void* stream) {
  const int64_t direct = reachable ? direct_pairs(pairs, into_host) : 0, staged = pairs - direct;
  const auto move_buffer = [&] {
    const int64_t launches = ceil_div(pairs, kManyPairs);
    for (int64_t n = 0; n < launches; ++n) {  // each with its share of both kinds
      const char* src[2];
      char* dst[2];
      PartOfSwap parts[2];
      for (int k = 0; k < 2; ++k) {
        const int64_t before = k ? staged : 0, count = k ? direct : staged;
        const int64_t from = before + count * n / launches;
        const int64_t to = before + count * (n + 1) / launches;
        char* dense = k ? host : staging;
        src[k] = into_host ? device : dense, dst[k] = into_host ? dense : device;
        const Ids here{device_ids, from}, there{k ? host_ids : nullptr, from};
        const unsigned most_ctas = k ? kDirectCtas : 3 * device_facts().sms;
        parts[k] = {
            src + k,   dst + k,  to > from, into_host ? here : there, into_host ? there : here,
            to - from, most_ctas};
      }
      const int error = launch_parts(shape, into_host ? device_block : host_block,
                                     into_host ? host_block : device_block, parts, stream);
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
