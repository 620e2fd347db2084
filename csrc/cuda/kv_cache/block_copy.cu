// copy_blocks, swap_blocks, repeat_kv: bytes move, in units as wide as every address and size
// allows (16 bytes, where they do).
//
//   region   runs of contiguous bytes under up to four outer dimensions (CopyShape); a dense block
//            is one run
//   mapping  a CTA moves chunks of kThreads * kUnroll units: chunk -> (cache, pair, part of the
//   block)
//
// The list of caches travels by value in the parameters (4 KB), so one launch serves all layers and
// nothing is copied to the device first; swap_blocks also carries its pairs, which are on the host.
// copy_blocks reads its pairs on the device. Writes KV, so no early launch of the next kernel.
#include "../common/dtype.cuh"
#include "../common/launch.cuh"
#include "divide.cuh"
#include "kv_cache.h"

namespace fastinfer::cuda {
namespace {

constexpr int kThreads = 256, kUnroll = 4, kChunk = kThreads * kUnroll;
constexpr int kMaxDims = CopyShape::kMaxDims;

// Units of a region (fewer than 2^31) -> byte offsets on both sides.
struct Offsets {
  int64_t src, dst;
};
struct Region {
  int32_t units, unit, dims;
  Divisor run_divisor, divisor[kMaxDims];
  int64_t src_stride[kMaxDims], dst_stride[kMaxDims];

  __device__ __forceinline__ Offsets locate(uint32_t i) const {
    uint32_t rest;
    uint32_t n = run_divisor(i, rest);
    Offsets o{static_cast<int64_t>(rest) * unit, static_cast<int64_t>(rest) * unit};
#pragma unroll
    for (int d = 0; d < kMaxDims; ++d) {
      if (d >= dims) break;
      uint32_t at;
      n = divisor[d](n, at);
      o.src += at * src_stride[d];
      o.dst += at * dst_stride[d];
    }
    return o;
  }
};

// Units [first, first + count) of a region, count <= kChunk, to n_rep places rep_stride apart.
// kDense: one run.
template <class Unit, bool kDense>
__device__ __forceinline__ void copy_units(const Region& r, const char* src, char* dst,
                                           int64_t first, uint32_t count, int64_t n_rep,
                                           int64_t rep_stride) {
  Unit value[kUnroll];
  int64_t to[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const uint32_t i = u * kThreads + threadIdx.x;
    if (i < count) {
      Offsets o;
      if constexpr (kDense) {
        o.src = o.dst = static_cast<int64_t>(first + i) * sizeof(Unit);
      } else {
        o = r.locate(first + i);
      }
      value[u] = *reinterpret_cast<const Unit*>(src + o.src);
      to[u] = o.dst;
    }
  }
  for (int64_t rep = 0; rep < n_rep; ++rep, dst += rep_stride) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (u * kThreads + threadIdx.x < count) *reinterpret_cast<Unit*>(dst + to[u]) = value[u];
  }
}

__device__ __forceinline__ void copy_chunk(const Region& r, const char* src, char* dst,
                                           int64_t chunk, int64_t n_rep = 1,
                                           int64_t rep_stride = 0) {
  const uint32_t first = chunk * kChunk, left = r.units - first;
  const uint32_t count = left < kChunk ? left : kChunk;
  if (r.unit == 16 && r.dims == 0) {
    copy_units<uint4, true>(r, src, dst, first, count, n_rep, rep_stride);
  } else if (r.unit == 16) {
    copy_units<uint4, false>(r, src, dst, first, count, n_rep, rep_stride);
  } else if (r.unit == 4) {
    copy_units<uint32_t, false>(r, src, dst, first, count, n_rep, rep_stride);
  } else if (r.unit == 2) {
    copy_units<uint16_t, false>(r, src, dst, first, count, n_rep, rep_stride);
  } else {
    copy_units<uint8_t, false>(r, src, dst, first, count, n_rep, rep_stride);
  }
}

struct RepeatParams {
  Region region;
  const char* src;
  char* dst;
  int64_t n_rep, rep_stride;
};

__global__ void __launch_bounds__(kThreads) repeat_kernel(const __grid_constant__ RepeatParams p) {
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
__global__ void __launch_bounds__(kThreads)
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

constexpr int kSwapCaches = 64, kSwapPairs = kMaxSwapPairs;
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
__global__ void __launch_bounds__(kThreads)
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
constexpr int64_t kMaxItems = (int64_t{1} << 31) - 1;

int64_t at_most(int64_t n, int64_t limit) { return n < limit ? n : limit; }

// `bits`: every address and every block stride, or-ed together.
Region region_of(const CopyShape& shape, int64_t bits) {
  Region r{};
  bits |= shape.run_bytes;
  for (int d = 0; d < shape.dims; ++d) bits |= shape.src_stride[d] | shape.dst_stride[d];
  r.unit = bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : bits % 2 == 0 ? 2 : 1;
  r.dims = shape.dims;
  int64_t units = shape.run_bytes / r.unit;
  r.run_divisor = Divisor(units);
  for (int d = 0; d < shape.dims; ++d) {
    r.divisor[d] = Divisor(shape.size[d]);
    r.src_stride[d] = shape.src_stride[d], r.dst_stride[d] = shape.dst_stride[d];
    units *= shape.size[d];
  }
  r.units = static_cast<int32_t>(units);
  return r;
}

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

int64_t bits_of(const void* p) { return reinterpret_cast<int64_t>(p); }

}  // namespace

int launch_repeat(const CopyShape& whole, const void* src, void* dst, int64_t n_rep,
                  int64_t rep_stride, void* stream) {
  return for_each_part(whole, 0, 0, [&](const CopyShape& shape, int64_t from, int64_t to) {
    const char* a = static_cast<const char*>(src) + from;
    char* b = static_cast<char*>(dst) + to;
    const int64_t bits = bits_of(a) | bits_of(b) | (n_rep > 1 ? rep_stride : 0);
    const RepeatParams p{region_of(shape, bits), a, b, n_rep, rep_stride};
    const dim3 grid(static_cast<unsigned>(ceil_div(p.region.units, kChunk)));
    return launch(repeat_kernel, grid, kThreads, 0, stream, p);
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
        const int error = launch(copy_blocks_kernel, grid, kThreads, 0, stream, p);
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
      const int64_t chunks = ceil_div(p.region.units, kChunk);
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
        const int error = launch(swap_blocks_kernel, grid, kThreads, 0, stream, p);
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
