// reshape_and_cache into 8-bit caches where there is much work: 16-bit tokens, everything aligned,
// both sides of one layout, offsets within a token or a block that fit 32 bits.
//
// A head belongs to 1 to 32 neighbouring lanes, each with kRowPacks packs of 8 elements, dealt in
// turn so that what an access of the warp touches lies together. What is left per thread beside the
// codes is index arithmetic, which at two packs takes as many instructions as they do; so blocks
// are shaped that no division is needed.
#pragma once

#include "../common/launch.cuh"
#include "divide.cuh"
#include "half_codes.cuh"

namespace fastinfer::cuda {

constexpr int kRowPacks = 4, kRowThreads = 32, kMostRowThreads = 1024;

struct RowsSide {
  const void* tokens;
  char* cache;
  float* scale;
  int64_t token_stride, block_stride;
};
struct RowsParams {
  RowsSide side[2];
  Indices slots;
  uint32_t tokens, part, token_head_stride, position_stride, head_stride, scale_slot, scale_head;
  int32_t block_size, block_shift, lanes_log2;  // shift -1: not a power of two
  bool dynamic, fp8, soft;
};
using RowPacks = HalfWords<4 * kRowPacks>;

// threadIdx.x is a lane of a head of a token, threadIdx.y and blockIdx.x are tokens.
template <class T>
__global__ void __launch_bounds__(kMostRowThreads)
    write_rows_kernel(const __grid_constant__ RowsParams p) {
  const RowsSide& s = p.side[blockIdx.y];
  const uint32_t lane = threadIdx.x & ((1u << p.lanes_log2) - 1);
  const uint32_t head = threadIdx.x >> p.lanes_log2;
  const uint32_t t = blockIdx.x * blockDim.y + threadIdx.y;
  grid_wait();
  RowPacks row{};
  int64_t slot = -1;
  float scale = 1.0f;
  if (t < p.tokens && lane * 8 < p.part) {
    slot = p.slots[t];
    const T* from = static_cast<const T*>(s.tokens) + t * s.token_stride +
                    (head * p.token_head_stride + lane * 8);
#pragma unroll
    for (int k = 0; k < kRowPacks; ++k)
      reinterpret_cast<uint4*>(&row)[k] = *reinterpret_cast<const uint4*>(from + k * p.part);
    if (!p.dynamic) scale = s.scale[head * p.scale_head];
  }
  uint32_t top;
  if (p.dynamic) {
    top = top_bits<T>(row);
#pragma unroll 1
    for (uint32_t other = (1u << p.lanes_log2) / 2; other > 0; other /= 2)
      top = max(top, __shfl_xor_sync(kAllLanes, top, other));
  } else {
    top = nan_bits<T>(row);
  }
  if (slot < 0) return;
  if (p.dynamic) {
    scale = dynamic_scale(top, p.fp8);
    if (lane == 0) s.scale[slot * p.scale_slot + head * p.scale_head] = scale;
  }
  const Slot at = split_slot(slot, p.block_size, p.block_shift);
  char* to =
      s.cache + at.block * s.block_stride +
      (static_cast<uint32_t>(at.position) * p.position_stride + head * p.head_stride + lane * 8);
  uint32_t code[2 * kRowPacks];
  half_codes<T>(code, row, scale, top, p.fp8, p.soft);
#pragma unroll
  for (int k = 0; k < kRowPacks; ++k)
    *reinterpret_cast<uint2*>(to + k * p.part) = make_uint2(code[2 * k], code[2 * k + 1]);
}

// ---- host
// A block of write_rows_kernel: the lanes of a token (a power of two per head) by as many tokens as
// make whole warps.
inline dim3 rows_block(int64_t heads, int lanes) {
  const unsigned width = static_cast<unsigned>(heads * lanes);
  unsigned height = kRowThreads / width > 1 ? kRowThreads / width : 1;
  while (height * width % 32 != 0) ++height;
  return dim3(width, height);
}

// Much work, both sides alike, offsets that fit 32 bits? (16-bit tokens in packs of 16 bytes.)
inline bool rows_fit(const cpu::CacheWriteParams& p, int64_t tokens) {
  const cpu::CacheSide &k = p.key, &v = p.value;
  const cpu::ScaleView &a = k.scale, &b = v.scale;
  const bool alike = k.token_head_stride == v.token_head_stride &&
                     k.position_stride == v.position_stride && k.head_stride == v.head_stride &&
                     a.dynamic == b.dynamic && a.block == b.block && a.position == b.position &&
                     a.head == b.head && a.block == a.position * p.block_size;
  int64_t most = tokens * p.heads;
  for (const int64_t n :
       {k.token_head_stride * p.heads, k.position_stride * p.block_size + k.head_stride * p.heads,
        a.position, a.head, p.block_size})
    most = n > most ? n : most;
  for (const int64_t n :
       {k.token_head_stride, k.position_stride, k.head_stride, a.position, a.head})
    if (n < 0) return false;
  const int64_t lanes = p.dim / (8 * kRowPacks);
  if (!alike || p.dim % (8 * kRowPacks) != 0 || most > INT32_MAX - p.dim) return false;
  const dim3 block = rows_block(p.heads, lanes_of_head(lanes));
  return block.x * block.y <= kMostRowThreads &&
         2 * tokens * p.heads * lanes >= int64_t{1024} * device_facts().sms;
}

template <class T>
int write_rows(const cpu::CacheWriteParams& p, int64_t tokens, bool soft, void* stream) {
  const cpu::CacheSide* sides[2] = {&p.key, &p.value};
  RowsParams r{};
  for (int i = 0; i < 2; ++i) {
    const cpu::CacheSide& s = *sides[i];
    r.side[i] = {s.tokens, static_cast<char*>(s.cache), s.scale.data, s.token_stride,
                 s.block_stride};
  }
  const cpu::CacheSide& k = p.key;
  r.slots = Indices(p.slots, p.slot_dtype, p.slot_stride);
  r.tokens = static_cast<uint32_t>(tokens), r.part = static_cast<uint32_t>(p.dim / kRowPacks);
  r.token_head_stride = static_cast<uint32_t>(k.token_head_stride);
  r.position_stride = static_cast<uint32_t>(k.position_stride);
  r.head_stride = static_cast<uint32_t>(k.head_stride);
  r.scale_slot = static_cast<uint32_t>(k.scale.position);
  r.scale_head = static_cast<uint32_t>(k.scale.head);
  r.block_size = static_cast<int32_t>(p.block_size), r.block_shift = -1;
  for (int b = 0; b < 31; ++b)
    if (int64_t{1} << b == p.block_size) r.block_shift = b;
  r.dynamic = k.scale.dynamic, r.fp8 = p.cache_dtype == DType::f8e4m3, r.soft = soft;
  const int lanes = lanes_of_head(p.dim / (8 * kRowPacks));
  while (1 << r.lanes_log2 < lanes) ++r.lanes_log2;
  const dim3 block = rows_block(p.heads, lanes);
  const dim3 grid(static_cast<unsigned>(ceil_div(tokens, block.y)), 2);
  return launch(write_rows_kernel<T>, grid, block, 0, stream, r);
}

}  // namespace fastinfer::cuda
