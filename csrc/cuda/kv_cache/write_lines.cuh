// reshape_and_cache into 8-bit caches where there is much work, for what models have: 16-bit
// tokens, heads of 64, 128 or 256 that lie next to each other on both sides, a power of two of 128
// elements per token, blocks of a power of two. Everything else goes to write_rows.cuh.
//
// Eight neighbouring lanes hold 128 elements of a token, two packs of 8 each, so that a load is of
// whole lines of 128 bytes and a thread has one head (two of 64 elements). All loads go first and
// stay there (load_once); what depends on slot and scale is worked out while the data are under
// way. With a static scale codes of fp8 are stored as they come, and a NaN is looked for in the
// codes afterwards: nothing else has that code. Dynamic scales of a block meet in shared memory, as
// memory takes them in whole sectors only: eight heads of a token. How many blocks an SM holds is
// measured (docs/kernels/kv_cache.md).
#pragma once

#include "../common/launch.cuh"
#include "divide.cuh"
#include "half_codes.cuh"

namespace fastinfer::cuda {

constexpr int kLinePacks = 2, kLineLanes = 8, kLineThreads = 256;
constexpr int kPackElements = 8, kPartElements = kLineLanes * kPackElements;
constexpr int kGroupElements = kLinePacks * kPartElements, kGroupLog2 = 7;
static_assert(1 << kGroupLog2 == kGroupElements);

struct LinesParams {  // strides in bytes, of scales in elements; [0] K, [1] V
  const char* tokens[2];
  char* cache[2];
  float* scale[2];
  const void* slots;
  int64_t block_stride;
  uint32_t num_tokens, token_stride, position_stride, scale_slot, scale_head;
  int32_t groups_log2, dim_log2, block_shift;
  bool wide_slots, fp8, soft;
};

__device__ __forceinline__ int64_t slot_of(const LinesParams& p, uint32_t t) {
  return p.wide_slots ? static_cast<const int64_t*>(p.slots)[t]
                      : static_cast<const int32_t*>(p.slots)[t];
}

// Read once, past L1. The compiler moves a plain load down to its first use, behind the branch that
// waits for slot and scale; this one stays where it is.
__device__ __forceinline__ uint4 load_once(const void* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// A pack with an odd scale or a NaN: element by element, from memory.
template <class T>
__device__ __noinline__ void rare_pack(const char* from, char* to, float scale, bool fp8,
                                       bool soft) {
#pragma unroll 1
  for (int i = 0; i < kPackElements; ++i) {
    const uint32_t bits = reinterpret_cast<const uint16_t*>(from)[i];
    const float x = copysignf(two_floats<T>(bits).x, bits >> 15 ? -1.0f : 1.0f);
    to[i] = static_cast<char>(code_of(x, __fdiv_rn(x, scale), fp8, soft));
  }
}

// Scales of the block's heads, by its first threads.
template <int kHeads>
__device__ __forceinline__ void store_scales(const LinesParams& p, const float (&scale)[kHeads]) {
  constexpr uint32_t kGroups = kLineThreads / kLineLanes;
  __shared__ float of_head[kGroups * kHeads];
  const uint32_t group = threadIdx.x / kLineLanes;
  if (threadIdx.x % kLineLanes == 0)
#pragma unroll
    for (int h = 0; h < kHeads; ++h) of_head[group * kHeads + h] = scale[h];
  __syncthreads();
  const uint32_t wide = p.dim_log2 == 8;  // two groups have one head
  if (threadIdx.x >= kGroups * kHeads >> wide) return;
  const uint32_t head = blockIdx.x * (kGroups * kHeads >> wide) + threadIdx.x;
  const int32_t heads_log2 = p.groups_log2 + kGroupLog2 - p.dim_log2;
  const uint32_t t = head >> heads_log2;
  if (t >= p.num_tokens) return;
  const int64_t slot = slot_of(p, t);
  if (slot >= 0)
    p.scale[blockIdx.y][slot * p.scale_slot + (head & ((1u << heads_log2) - 1)) * p.scale_head] =
        of_head[threadIdx.x << wide];
}

// kHeads: of a thread; 2 for heads of 64 elements.
template <class T, int kHeads, bool kDynamic>
__global__ void __launch_bounds__(kLineThreads, kDynamic ? 8 : 6)
    write_lines_kernel(const __grid_constant__ LinesParams p) {
  const uint32_t side = blockIdx.y;
  const uint32_t group = (blockIdx.x * kLineThreads + threadIdx.x) / kLineLanes;
  const uint32_t item = group >> p.groups_log2;
  const uint32_t t = min(item, p.num_tokens - 1);  // past the end: the last one again, not stored
  const uint32_t lane = threadIdx.x % kLineLanes;
  const uint32_t at = (group & ((1u << p.groups_log2) - 1)) * kGroupElements + lane * kPackElements;
  const char* from = p.tokens[side] + static_cast<uint64_t>(t) * p.token_stride + at * sizeof(T);
  grid_wait();
  int64_t slot = slot_of(p, t);
  HalfWords<4> row[kLinePacks];
#pragma unroll
  for (int k = 0; k < kLinePacks; ++k)
    reinterpret_cast<uint4&>(row[k]) = load_once(from + k * kPartElements * sizeof(T));
  float scale[kHeads];
  if constexpr (!kDynamic) {
    const float* const scales = p.scale[side] + (at >> p.dim_log2) * p.scale_head;
#pragma unroll
    for (int h = 0; h < kHeads; ++h)  // the same few for all blocks: through L1
      asm volatile("ld.global.f32 %0, [%1];" : "=f"(scale[h]) : "l"(scales + h * p.scale_head));
  }
  if (item >= p.num_tokens) slot = -1;
  const uint32_t position = static_cast<uint32_t>(slot) & ((1u << p.block_shift) - 1);
  char* to = p.cache[side] + (slot >> p.block_shift) * p.block_stride +
             (position * p.position_stride + at);

  bool quick = word_codes(true, p.fp8, p.soft) & (slot >= 0);
  if constexpr (kDynamic) {
    uint32_t top[kLinePacks];
#pragma unroll
    for (int k = 0; k < kLinePacks; ++k) top[k] = top_bits<T>(row[k]);
    if constexpr (kHeads == 1) {
      top[0] = max(top[0], top[1]);
      if (p.dim_log2 == 8) top[0] = max(top[0], __shfl_xor_sync(kAllLanes, top[0], kLineLanes));
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int other = kLineLanes / 2; other > 0; other /= 2)
        top[h] = max(top[h], __shfl_xor_sync(kAllLanes, top[h], other));
      scale[h] = dynamic_scale(top[h], p.fp8);
      quick = quick & (top[h] <= 0x7F800000u);
    }
    store_scales<kHeads>(p, scale);
  } else if (!p.fp8) {
#pragma unroll
    for (int k = 0; k < kLinePacks; ++k) quick = quick & (nan_bits<T>(row[k]) <= 0x7F800000u);
  }
  HalfQuotient divide[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    divide[h] = HalfQuotient(scale[h]);
    quick = quick & divide[h].quick;
  }
  uint32_t seen = 0;  // bit 7 of a byte that was the code of a NaN
  const auto write = [&](auto fp8, int k) {
    const HalfQuotient& d = divide[kHeads == 1 ? 0 : k];
    const uint32_t a = four_half_codes<T>(row[k].word[0], row[k].word[1], d, decltype(fp8)::value);
    const uint32_t b = four_half_codes<T>(row[k].word[2], row[k].word[3], d, decltype(fp8)::value);
    if (!kDynamic && decltype(fp8)::value)
      seen |= ((a & 0x7F7F7F7Fu) + 0x01010101u) | ((b & 0x7F7F7F7Fu) + 0x01010101u);
    *reinterpret_cast<uint2*>(to + k * kPartElements) = make_uint2(a, b);
  };
  if (quick) {
    if constexpr (kDynamic) {  // a branch per pack: the first one is stored before the second
#pragma unroll
      for (int k = 0; k < kLinePacks; ++k) {
        if (p.fp8) {
          write(std::true_type(), k);
        } else {
          write(std::false_type(), k);
        }
      }
    } else if (p.fp8) {
#pragma unroll
      for (int k = 0; k < kLinePacks; ++k) write(std::true_type(), k);
    } else {
#pragma unroll
      for (int k = 0; k < kLinePacks; ++k) write(std::false_type(), k);
    }
    if ((seen & 0x80808080u) == 0) return;
  }
  if (slot < 0) return;
#pragma unroll
  for (int k = 0; k < kLinePacks; ++k)
    rare_pack<T>(from + k * kPartElements * sizeof(T), to + k * kPartElements,
                 scale[kHeads == 1 ? 0 : k], p.fp8, p.soft);
}

// ---- host
inline bool power_of_two(int64_t n) { return n > 0 && (n & (n - 1)) == 0; }
inline int32_t log2_of_power(int64_t n) {
  int32_t log2 = 0;
  while (int64_t{1} << log2 < n) ++log2;
  return log2;
}

// For tokens that rows_fit().
inline bool lines_fit(const cpu::CacheWriteParams& p, int64_t tokens) {
  const cpu::CacheSide &k = p.key, &v = p.value;
  const int64_t width = p.heads * p.dim;
  return (p.dim == 64 || p.dim == 128 || p.dim == 256) && width % kGroupElements == 0 &&
         power_of_two(width) && power_of_two(p.block_size) && p.slot_stride == 1 &&
         tokens * width <= INT32_MAX && k.token_stride == v.token_stride && k.token_stride >= 0 &&
         k.token_stride <= INT32_MAX && k.block_stride == v.block_stride &&
         (p.heads == 1 || (k.token_head_stride == p.dim && k.head_stride == p.dim));
}

template <class T>
int write_lines(const cpu::CacheWriteParams& p, int64_t tokens, bool soft, void* stream) {
  const cpu::CacheSide* sides[2] = {&p.key, &p.value};
  LinesParams r{};
  for (int i = 0; i < 2; ++i) {
    r.tokens[i] = static_cast<const char*>(sides[i]->tokens);
    r.cache[i] = static_cast<char*>(sides[i]->cache);
    r.scale[i] = sides[i]->scale.data;
  }
  const cpu::CacheSide& k = p.key;
  r.slots = p.slots, r.wide_slots = p.slot_dtype == DType::i64;
  r.num_tokens = static_cast<uint32_t>(tokens);
  r.token_stride = static_cast<uint32_t>(k.token_stride * static_cast<int64_t>(sizeof(T)));
  r.block_stride = k.block_stride;
  r.position_stride = static_cast<uint32_t>(k.position_stride);
  r.scale_slot = static_cast<uint32_t>(k.scale.position);
  r.scale_head = static_cast<uint32_t>(k.scale.head);
  const int64_t groups = p.heads * p.dim / kGroupElements;
  r.groups_log2 = log2_of_power(groups), r.dim_log2 = log2_of_power(p.dim);
  r.block_shift = log2_of_power(p.block_size);
  r.fp8 = p.cache_dtype == DType::f8e4m3, r.soft = soft;
  const dim3 grid(static_cast<unsigned>(ceil_div(tokens * groups * kLineLanes, kLineThreads)), 2);
  const bool two = p.dim == 64;
  return launch(k.scale.dynamic
                    ? (two ? write_lines_kernel<T, 2, true> : write_lines_kernel<T, 1, true>)
                    : (two ? write_lines_kernel<T, 2, false> : write_lines_kernel<T, 1, false>),
                grid, kLineThreads, 0, stream, r);
}

}  // namespace fastinfer::cuda
