// A region: runs of contiguous bytes under up to four outer dimensions (CopyShape), moved in units
// as wide as every address and size allows. A dense block is one run. A CTA moves a chunk at a
// time, kUnroll units per thread: several over a link, which needs bytes under way, one within the
// memory of a GPU (measured: docs/kernels/kv_cache.md).
#pragma once

#include "../common/launch.cuh"
#include "divide.cuh"
#include "kv_cache.h"

namespace fastinfer::cuda {

constexpr int kCopyThreads = 256;

// Units of a region (fewer than 2^31) -> byte offsets on both sides.
struct Offsets {
  int64_t src, dst;
};
struct Region {
  int32_t units, unit, dims;
  Divisor run_divisor, divisor[CopyShape::kMaxDims];
  int64_t src_stride[CopyShape::kMaxDims], dst_stride[CopyShape::kMaxDims];

  __device__ __forceinline__ Offsets locate(uint32_t i) const {
    uint32_t rest;
    uint32_t n = run_divisor(i, rest);
    Offsets o{static_cast<int64_t>(rest) * unit, static_cast<int64_t>(rest) * unit};
#pragma unroll
    for (int d = 0; d < CopyShape::kMaxDims; ++d) {
      if (d >= dims) break;
      uint32_t at;
      n = divisor[d](n, at);
      o.src += at * src_stride[d];
      o.dst += at * dst_stride[d];
    }
    return o;
  }
};

// Units [first, first + count) of a region, count <= kCopyThreads * kUnroll, to n_rep places
// rep_stride apart. kDense: one run.
template <class Unit, bool kDense, int kUnroll>
__device__ __forceinline__ void copy_units(const Region& r, const char* src, char* dst,
                                           int64_t first, uint32_t count, int64_t n_rep,
                                           int64_t rep_stride) {
  Unit value[kUnroll];
  int64_t to[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const uint32_t i = u * kCopyThreads + threadIdx.x;
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
      if (u * kCopyThreads + threadIdx.x < count) *reinterpret_cast<Unit*>(dst + to[u]) = value[u];
  }
}

template <int kUnroll>
__device__ __forceinline__ void copy_chunk(const Region& r, const char* src, char* dst,
                                           int64_t chunk, int64_t n_rep = 1,
                                           int64_t rep_stride = 0) {
  constexpr uint32_t kChunk = kCopyThreads * kUnroll;
  const uint32_t first = chunk * kChunk, left = r.units - first;
  const uint32_t count = left < kChunk ? left : kChunk;
  if (r.unit == 16 && r.dims == 0) {
    copy_units<uint4, true, kUnroll>(r, src, dst, first, count, n_rep, rep_stride);
  } else if (r.unit == 16) {
    copy_units<uint4, false, kUnroll>(r, src, dst, first, count, n_rep, rep_stride);
  } else if (r.unit == 4) {
    copy_units<uint32_t, false, kUnroll>(r, src, dst, first, count, n_rep, rep_stride);
  } else if (r.unit == 2) {
    copy_units<uint16_t, false, kUnroll>(r, src, dst, first, count, n_rep, rep_stride);
  } else {
    copy_units<uint8_t, false, kUnroll>(r, src, dst, first, count, n_rep, rep_stride);
  }
}

inline int64_t bits_of(const void* p) { return reinterpret_cast<int64_t>(p); }

// `bits`: every address and every block stride, or-ed together.
inline Region region_of(const CopyShape& shape, int64_t bits) {
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

inline int64_t at_most(int64_t n, int64_t limit) { return n < limit ? n : limit; }

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

}  // namespace fastinfer::cuda
