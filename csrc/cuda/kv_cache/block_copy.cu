// copy_blocks, swap_blocks, repeat_kv: bytes move, in units as wide as every address and size
// allows (16 bytes, where they do).
//
//   region   what a block is, region.cuh
//   mapping  a CTA moves chunks: chunk -> (cache, pair, part of the
//   block)
//
// The list of caches travels by value in the parameters (4 KB), so one launch serves all layers and
// nothing is copied to the device first; swap_blocks also carries its pairs, which are on the host.
// copy_blocks reads its pairs on the device. Writes KV, so no early launch of the next kernel.
#include "../common/dtype.cuh"
#include "region.cuh"

namespace fastinfer::cuda {
namespace {

struct RepeatParams {
  Region region;
  const char* src;
  char* dst;
  int64_t n_rep, rep_stride;
};

__global__ void __launch_bounds__(kCopyThreads)
    repeat_kernel(const __grid_constant__ RepeatParams p) {
  grid_wait();
  copy_chunk(p.region, p.src, p.dst, blockIdx.x, p.n_rep, p.rep_stride);
}

struct CopyParams {
  Region region;
  const void* mapping;
  DType dtype;
  int64_t pair_stride, side_stride, num_blocks, block_stride;
  Divisor chunks;  // per block
  char* caches[kMaxCaches];
};
static_assert(sizeof(CopyParams) <= 4096, "kernel parameters beyond 4 KB need newer drivers");

__device__ __forceinline__ int64_t block_id(const CopyParams& p, int64_t pair, int64_t side) {
  return index_at(p.mapping, p.dtype, pair * p.pair_stride + side * p.side_stride);
}

// Grid: x = (pair, chunk), y = cache.
__global__ void __launch_bounds__(kCopyThreads)
    copy_blocks_kernel(const __grid_constant__ CopyParams p) {
  grid_wait();
  uint32_t chunk;
  const int64_t pair = p.chunks(blockIdx.x, chunk);
  const int64_t src = block_id(p, pair, 0), dst = block_id(p, pair, 1);
  const uint64_t blocks = static_cast<uint64_t>(p.num_blocks);
  if (static_cast<uint64_t>(src) >= blocks || static_cast<uint64_t>(dst) >= blocks || src == dst)
    return;
  char* cache = p.caches[blockIdx.y];
  copy_chunk(p.region, cache + src * p.block_stride, cache + dst * p.block_stride, chunk);
}

constexpr int kSwapCaches = 64, kSwapPairs = 320;
constexpr int64_t kLinkCtas = 64;  // 1 MiB in flight: many times what fills a PCIe link

struct SwapParams {
  Region region;
  int64_t src_block, dst_block, items;
  Divisor chunks, pairs;
  const char* src[kSwapCaches];
  char* dst[kSwapCaches];
  int32_t ids[kSwapPairs][2];
};
static_assert(sizeof(SwapParams) <= 4096, "kernel parameters beyond 4 KB need newer drivers");

// Items: (cache, pair, chunk).
__global__ void __launch_bounds__(kCopyThreads)
    swap_blocks_kernel(const __grid_constant__ SwapParams p) {
  grid_wait();
  for (int64_t item = blockIdx.x; item < p.items; item += gridDim.x) {
    uint32_t chunk, pair;
    const uint32_t cache = p.pairs(p.chunks(static_cast<uint32_t>(item), chunk), pair);
    const char* src = p.src[cache] + p.ids[pair][0] * p.src_block;
    char* dst = p.dst[cache] + p.ids[pair][1] * p.dst_block;
    if (src != dst) copy_chunk(p.region, src, dst, chunk);
  }
}

// ---- host
int64_t at_most(int64_t n, int64_t limit) { return n < limit ? n : limit; }

constexpr int64_t kMaxItems = (int64_t{1} << 31) - 1;

// f(part, src offset, dst offset) for parts of fewer than 2^31 bytes: almost always the whole
// shape.
template <class F>
int for_each_part(const CopyShape& shape, int64_t src, int64_t dst, const F& f) {
  int64_t bytes = shape.run_bytes;
  for (int d = 0; d < shape.dims; ++d) bytes *= shape.size[d];
  if (bytes <= kMaxItems) return f(shape, src, dst);
  CopyShape head = shape, tail = shape;
  int64_t src_step, dst_step;
  const int last = shape.dims - 1;
  if (last >= 0 && shape.size[last] == 1) {
    --head.dims;
    return for_each_part(head, src, dst, f);
  } else if (last >= 0) {
    head.size[last] = shape.size[last] / 2, tail.size[last] -= head.size[last];
    src_step = head.size[last] * shape.src_stride[last];
    dst_step = head.size[last] * shape.dst_stride[last];
  } else {
    head.run_bytes = src_step = dst_step = shape.run_bytes / 32 * 16;
    tail.run_bytes -= head.run_bytes;
  }
  const int error = for_each_part(head, src, dst, f);
  return error ? error : for_each_part(tail, src + src_step, dst + dst_step, f);
}

}  // namespace

int launch_repeat(const CopyShape& whole, const void* src, void* dst, int64_t n_rep,
                  int64_t rep_stride, void* stream) {
  return for_each_part(whole, 0, 0, [&](const CopyShape& shape, int64_t from, int64_t to) {
    const char* a = static_cast<const char*>(src) + from;
    char* b = static_cast<char*>(dst) + to;
    const int64_t bits = bits_of(a) | bits_of(b) | (n_rep > 1 ? rep_stride : 0);
    const RepeatParams p{region_of(shape, bits), a, b, n_rep, rep_stride};
    const dim3 grid(static_cast<unsigned>(ceil_div(p.region.units, kCopyChunk)));
    return launch(repeat_kernel, grid, kCopyThreads, 0, stream, p);
  });
}

int launch_copy_blocks(const CopyShape& whole, int64_t block_stride, int64_t num_blocks,
                       char* const* caches, int64_t count, const DeviceMapping& mapping,
                       void* stream) {
  return for_each_part(whole, 0, 0, [&](const CopyShape& shape, int64_t offset, int64_t) {
    for (int64_t c = 0; c < count; c += kMaxCaches) {
      const int64_t some = at_most(count - c, kMaxCaches);
      CopyParams p;
      int64_t bits = block_stride;
      for (int64_t i = 0; i < some; ++i) bits |= bits_of(p.caches[i] = caches[c + i] + offset);
      p.region = region_of(shape, bits);
      p.dtype = mapping.dtype;
      p.pair_stride = mapping.pair_stride, p.side_stride = mapping.side_stride;
      p.num_blocks = num_blocks, p.block_stride = block_stride;
      const int64_t chunks = ceil_div(p.region.units, kCopyChunk);
      p.chunks = Divisor(chunks);
      const int64_t step = kMaxItems / chunks;  // pairs of one launch: practically all
      for (int64_t first = 0; first < mapping.pairs; first += step) {
        p.mapping = static_cast<const char*>(mapping.data) +
                    first * mapping.pair_stride * dtype_size(mapping.dtype);
        const dim3 grid(static_cast<unsigned>(at_most(mapping.pairs - first, step) * chunks),
                        static_cast<unsigned>(some));
        const int error = launch(copy_blocks_kernel, grid, kCopyThreads, 0, stream, p);
        if (error) return error;
      }
    }
    return 0;
  });
}

int launch_swap_blocks(const CopyShape& whole, int64_t src_block, int64_t dst_block,
                       const char* const* src, char* const* dst, int64_t count,
                       const int64_t* src_ids, const int64_t* dst_ids, int64_t pairs,
                       bool over_pcie, void* stream) {
  return for_each_part(whole, 0, 0, [&](const CopyShape& shape, int64_t from, int64_t to) {
    for (int64_t c = 0; c < count; c += kSwapCaches) {
      const int64_t some = at_most(count - c, kSwapCaches);
      SwapParams p;
      int64_t bits = src_block | dst_block;
      for (int64_t i = 0; i < some; ++i)
        bits |= bits_of(p.src[i] = src[c + i] + from) | bits_of(p.dst[i] = dst[c + i] + to);
      p.region = region_of(shape, bits);
      p.src_block = src_block, p.dst_block = dst_block;
      const int64_t chunks = ceil_div(p.region.units, kCopyChunk);
      p.chunks = Divisor(chunks);
      const int64_t room = at_most(kSwapPairs, kMaxItems / (chunks * some));
      const int64_t step = room > 1 ? room : 1;
      for (int64_t first = 0; first < pairs; first += step) {
        const int64_t now = at_most(pairs - first, step);
        for (int64_t j = 0; j < now; ++j) {
          p.ids[j][0] = static_cast<int32_t>(src_ids[first + j]);
          p.ids[j][1] = static_cast<int32_t>(dst_ids[first + j]);
        }
        p.pairs = Divisor(now);
        p.items = some * now * chunks;
        const dim3 grid(static_cast<unsigned>(at_most(p.items, over_pcie ? kLinkCtas : kMaxItems)));
        const int error = launch(swap_blocks_kernel, grid, kCopyThreads, 0, stream, p);
        if (error) return error;
      }
    }
    return 0;
  });
}

bool is_pinned(const void* p, int64_t bytes) {
  for (const void* at : {p, static_cast<const void*>(static_cast<const char*>(p) + bytes - 1)}) {
    cudaPointerAttributes a;
    if (cudaPointerGetAttributes(&a, at) != cudaSuccess) {
      cudaGetLastError();
      return false;
    }
    if (a.type != cudaMemoryTypeHost || a.devicePointer != at) return false;
  }
  return true;
}

int copy_async(void* dst, const void* src, int64_t bytes, void* stream) {
  return cudaMemcpyAsync(dst, src, static_cast<size_t>(bytes), cudaMemcpyDefault,
                         static_cast<cudaStream_t>(stream));
}

int order_streams(void* earlier, int device, void* later) {
  int current = 0;
  cudaGetDevice(&current);
  cudaSetDevice(device);
  cudaEvent_t event;
  cudaError_t error = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
  if (error == cudaSuccess) {
    error = cudaEventRecord(event, static_cast<cudaStream_t>(earlier));
    cudaSetDevice(current);
    if (error == cudaSuccess)
      error = cudaStreamWaitEvent(static_cast<cudaStream_t>(later), event, 0);
    cudaEventDestroy(event);  // after the work it waits for
  }
  cudaSetDevice(current);
  return error;
}

}  // namespace fastinfer::cuda
