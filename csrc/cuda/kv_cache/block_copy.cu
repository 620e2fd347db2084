// copy_blocks and repeat_kv: bytes move, in units as wide as every address and size
// allows (16 bytes, where they do).
//
//   region   what a block is, region.cuh
//   mapping  a CTA moves chunks: chunk -> (cache, pair, part of the
//   block)
//
// The list of caches travels by value in the parameters (4 KB), so one launch serves all layers and
// nothing is copied to the device first. The pairs are read on the device. Writes KV, so no early
// launch of the next kernel.
#include "../common/dtype.cuh"
#include "region.cuh"

namespace fastinfer::cuda {
namespace {

constexpr int kUnroll = 1, kChunk = kCopyThreads * kUnroll;

struct RepeatParams {
  Region region;
  const char* src;
  char* dst;
  int64_t n_rep, rep_stride;
};

__global__ void __launch_bounds__(kCopyThreads)
    repeat_kernel(const __grid_constant__ RepeatParams p) {
  grid_wait();
  copy_chunk<kUnroll>(p.region, p.src, p.dst, blockIdx.x, p.n_rep, p.rep_stride);
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
  copy_chunk<kUnroll>(p.region, cache + src * p.block_stride, cache + dst * p.block_stride, chunk);
}

}  // namespace

int launch_repeat(const CopyShape& whole, const void* src, void* dst, int64_t n_rep,
                  int64_t rep_stride, void* stream) {
  return for_each_part(whole, 0, 0, [&](const CopyShape& shape, int64_t from, int64_t to) {
    const char* a = static_cast<const char*>(src) + from;
    char* b = static_cast<char*>(dst) + to;
    const int64_t bits = bits_of(a) | bits_of(b) | (n_rep > 1 ? rep_stride : 0);
    const RepeatParams p{region_of(shape, bits), a, b, n_rep, rep_stride};
    const dim3 grid(static_cast<unsigned>(ceil_div(p.region.units, kChunk)));
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
      const int64_t chunks = ceil_div(p.region.units, kChunk);
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
