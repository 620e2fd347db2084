// reshape_and_cache into 8-bit caches where there is much work: 16-bit tokens, heads of 64, 128 or
// 256, everything aligned, both sides of one layout, offsets within a token or a block that fit 32
// bits.
//
// Eight neighbouring lanes hold 256 elements, four packs of 8 each, so that every access is of
// whole lines of 128 bytes: one head, two or four. All loads of a thread go first and are kept
// there (see load_once); codes are made and stored pack by pack as the data arrive, under a static
// scale each with a look for NaN of its own. What is left per thread beside the codes is index
// arithmetic, which at two packs takes as many instructions as they do; so blocks are shaped that
// no division is needed.
#pragma once

#include "../common/launch.cuh"
#include "divide.cuh"
#include "half_codes.cuh"

namespace fastinfer::cuda {

constexpr int kRowPacks = 4, kRowLanes = 8, kRowThreads = 64, kMostRowThreads = 1024;
constexpr int kPackElements = 8, kPartElements = kRowLanes * kPackElements;

struct RowsSide {
  const void* tokens;
  char* cache;
  float* scale;
  int64_t token_stride, block_stride;
};
struct RowsParams {
  RowsSide side[2];
  Indices slots;
  uint32_t tokens, heads, token_head_stride, position_stride, head_stride, scale_slot, scale_head;
  int32_t block_size, block_shift;  // shift -1: not a power of two
  bool dynamic, fp8, soft;
};

static __device__ __noinline__ Slot divide_slot(int64_t slot, int32_t block_size) {
  return split_slot(slot, block_size);
}

// Read once, past L1. The compiler moves a plain load down to its first use, behind the branches
// that wait for slot and scale; this one stays where it is.
template <class T>
__device__ __forceinline__ T load_once(const void* p) {
  T v;
  if constexpr (sizeof(T) == 16) {
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
  } else {
    asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(v) : "l"(p));
  }
  return v;
}

// A pack whose scale is odd or that holds NaN, element by element from memory.
template <class T>
__device__ __noinline__ void rare_pack(const T* from, char* to, float scale, bool fp8, bool soft) {
#pragma unroll 1
  for (int i = 0; i < kPackElements; ++i) {
    const uint32_t bits = reinterpret_cast<const uint16_t*>(from)[i];
    const float x = copysignf(two_floats<T>(bits).x, bits >> 15 ? -1.0f : 1.0f);
    to[i] = static_cast<char>(code_of(x, __fdiv_rn(x, scale), fp8, soft));
  }
}

template <class T, bool kFp8>
__device__ __forceinline__ void store_codes_of(char* to, const HalfWords<4>& row,
                                               const HalfQuotient& divide) {
  *reinterpret_cast<uint2*>(to) =
      make_uint2(four_half_codes<T>(row.word[0], row.word[1], divide, kFp8),
                 four_half_codes<T>(row.word[2], row.word[3], divide, kFp8));
}

// kParts: of 64 elements, of a head. threadIdx.x is a lane of a token, threadIdx.y and blockIdx.x
// are tokens.
template <class T, int kParts>
__global__ void __launch_bounds__(kMostRowThreads)
    write_rows_kernel(const __grid_constant__ RowsParams p) {
  constexpr int kHeads = kRowPacks / kParts;
  const RowsSide& s = p.side[blockIdx.y];
  const uint32_t lane = threadIdx.x % kRowLanes, first = threadIdx.x / kRowLanes * kHeads;
  const uint32_t item = blockIdx.x * blockDim.y + threadIdx.y;
  const uint32_t t = min(item, p.tokens - 1);  // lanes past the end read the last one again
  const T* from = static_cast<const T*>(s.tokens) + t * s.token_stride +
                  (first * p.token_head_stride + lane * kPackElements);
  grid_wait();
  const auto here = [&](int h) { return kHeads == 1 || h == 0 || first + h < p.heads; };
  HalfWords<4> row[kHeads][kParts] = {};
  int64_t slot = p.slots[t];
#pragma unroll
  for (int h = 0; h < kHeads; ++h)
#pragma unroll
    for (int k = 0; k < kParts; ++k)
      if (here(h))
        reinterpret_cast<uint4&>(row[h][k]) =
            load_once<uint4>(from + h * p.token_head_stride + k * kPartElements);
  float scale[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h)
    if (!p.dynamic) scale[h] = load_once<float>(s.scale + (here(h) ? first + h : 0) * p.scale_head);
  if (item >= p.tokens) slot = -1;
  const Slot at = p.block_shift >= 0
                      ? Slot{slot >> p.block_shift, slot & ((1 << p.block_shift) - 1)}
                      : divide_slot(slot, p.block_size);
  char* to = s.cache + at.block * s.block_stride +
             (static_cast<uint32_t>(at.position) * p.position_stride + first * p.head_stride +
              lane * kPackElements);
  const bool words = word_codes(true, p.fp8, p.soft);
  const auto each_pack = [&](int h, auto&& run) {
#pragma unroll
    for (int k = 0; k < kParts; ++k)
      run(k, to + h * p.head_stride + k * kPartElements,
          from + h * p.token_head_stride + k * kPartElements);
  };

  if (p.dynamic) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      uint32_t top = top_bits<T>(row[h][0]);
#pragma unroll
      for (int k = 1; k < kParts; ++k) top = max(top, top_bits<T>(row[h][k]));
#pragma unroll
      for (int other = kRowLanes / 2; other > 0; other /= 2)
        top = max(top, __shfl_xor_sync(kAllLanes, top, other));
      if (slot < 0 || !here(h)) continue;
      scale[h] = dynamic_scale(top, p.fp8);
      if (lane == 0) s.scale[slot * p.scale_slot + (first + h) * p.scale_head] = scale[h];
      const HalfQuotient divide(scale[h]);
      if (!(words && divide.quick && top <= 0x7F800000u)) {
        each_pack(h, [&](int, char* to, const T* from) {
          rare_pack<T>(from, to, scale[h], p.fp8, p.soft);
        });
      } else if (p.fp8) {
        each_pack(
            h, [&](int k, char* to, const T*) { store_codes_of<T, true>(to, row[h][k], divide); });
      } else {
        each_pack(
            h, [&](int k, char* to, const T*) { store_codes_of<T, false>(to, row[h][k], divide); });
      }
    }
    return;
  }
  bool quick = words & (slot >= 0);
  HalfQuotient divide[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    divide[h] = HalfQuotient(scale[h]);
    quick = quick & divide[h].quick;
  }
  const auto heads = [&](auto fp8) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h)
      if (here(h))
        each_pack(h, [&](int k, char* to, const T* from) {
          if (quick && nan_bits<T>(row[h][k]) <= 0x7F800000u) {
            store_codes_of<T, decltype(fp8)::value>(to, row[h][k], divide[h]);
          } else {
            rare_pack<T>(from, to, scale[h], decltype(fp8)::value, p.soft);
          }
        });
  };
  if (slot < 0) return;
  if (p.fp8) {
    heads(std::true_type());
  } else {
    heads(std::false_type());
  }
}

// ---- host
// A block of write_rows_kernel: the lanes of a token by as many tokens as make whole warps.
inline dim3 rows_block(int64_t heads, int64_t dim) {
  const int64_t elements = kRowPacks * kPackElements;  // of a thread
  const unsigned width =
      static_cast<unsigned>(ceil_div(heads * dim, kRowLanes * elements) * kRowLanes);
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
  if (!alike || (p.dim != 64 && p.dim != 128 && p.dim != 256) || most > INT32_MAX - p.dim)
    return false;
  const dim3 block = rows_block(p.heads, p.dim);
  return block.x * block.y <= kMostRowThreads &&
         2 * tokens * p.heads * p.dim >= int64_t{32 * 1024} * device_facts().sms;
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
  r.tokens = static_cast<uint32_t>(tokens), r.heads = static_cast<uint32_t>(p.heads);
  r.token_head_stride = static_cast<uint32_t>(k.token_head_stride);
  r.position_stride = static_cast<uint32_t>(k.position_stride);
  r.head_stride = static_cast<uint32_t>(k.head_stride);
  r.scale_slot = static_cast<uint32_t>(k.scale.position);
  r.scale_head = static_cast<uint32_t>(k.scale.head);
  r.block_size = static_cast<int32_t>(p.block_size), r.block_shift = -1;
  for (int b = 0; b < 31; ++b)
    if (int64_t{1} << b == p.block_size) r.block_shift = b;
  r.dynamic = k.scale.dynamic, r.fp8 = p.cache_dtype == DType::f8e4m3, r.soft = soft;
  const dim3 block = rows_block(p.heads, p.dim);
  const dim3 grid(static_cast<unsigned>(ceil_div(tokens, block.y)), 2);
  return launch(p.dim == 64    ? write_rows_kernel<T, 1>
                : p.dim == 128 ? write_rows_kernel<T, 2>
                               : write_rows_kernel<T, 4>,
                grid, block, 0, stream, r);
}

}  // namespace fastinfer::cuda
