// reshape_and_cache into 8-bit caches under a static scale where there is much work, for what
// models have: 16-bit tokens, heads of 64, 128 or 256 that lie next to each other on both sides,
// blocks of a power of two. Everything else goes to write_rows.cuh.
//
// Eight neighbouring lanes hold 256 elements of a token, four packs of 8 each: one head, two or
// four, and every access is of whole lines of 128 bytes. All loads go first and stay there
// (load_once); what depends on slot and scale is worked out while the data are under way, and codes
// are made and stored pack by pack as they arrive. A copy without any conversion to the same places
// is no faster (docs/kernels/kv_cache.md).
#pragma once

#include "../common/launch.cuh"
#include "divide.cuh"
#include "half_codes.cuh"

namespace fastinfer::cuda {

constexpr int kLinePacks = 4, kLineLanes = 8, kLineThreads = 128, kMostLineThreads = 1024;
constexpr int kPackElements = 8, kPartElements = kLineLanes * kPackElements;
constexpr int kGroupElements = kLinePacks * kPartElements;

struct LinesSide {
  const char* tokens;
  char* cache;
  const float* scale;
  int64_t token_stride, block_stride;  // bytes
};
struct LinesParams {
  LinesSide side[2];
  Indices slots;
  uint32_t tokens, position_stride, scale_head;
  int32_t block_shift;
  bool fp8, soft;
};

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

// kParts: of 64 elements, of a head. threadIdx.x is a lane of a token, threadIdx.y and blockIdx.x
// are tokens.
template <class T, int kParts>
__global__ void __launch_bounds__(kMostLineThreads)
    write_lines_kernel(const __grid_constant__ LinesParams p) {
  constexpr int kHeads = kLinePacks / kParts;
  const LinesSide& s = p.side[blockIdx.y];
  const uint32_t t = blockIdx.x * blockDim.y + threadIdx.y;
  if (t >= p.tokens) return;
  const uint32_t group = threadIdx.x / kLineLanes;
  const uint32_t at = group * kGroupElements + threadIdx.x % kLineLanes * kPackElements;
  const char* from = s.tokens + t * s.token_stride + at * sizeof(T);
  const float* scales = s.scale + group * kHeads * p.scale_head;
  grid_wait();
  const int64_t slot = p.slots[t];
  HalfWords<4> row[kLinePacks];
#pragma unroll
  for (int k = 0; k < kLinePacks; ++k)
    reinterpret_cast<uint4&>(row[k]) = load_once(from + k * kPartElements * sizeof(T));
  float scale[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h)  // the same few for all blocks: through L1
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(scale[h]) : "l"(scales + h * p.scale_head));

  const uint32_t position = static_cast<uint32_t>(slot) & ((1u << p.block_shift) - 1);
  char* to =
      s.cache + (slot >> p.block_shift) * s.block_stride + (position * p.position_stride + at);
  bool quick = word_codes(true, p.fp8, p.soft) & (slot >= 0);
  HalfQuotient divide[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    divide[h] = HalfQuotient(scale[h]);
    quick = quick & divide[h].quick;
  }
  if (!quick) {
    if (slot < 0) return;
#pragma unroll 1
    for (int k = 0; k < kLinePacks; ++k)
      rare_pack<T>(from + k * kPartElements * sizeof(T), to + k * kPartElements,
                   scales[k / kParts * p.scale_head], p.fp8, p.soft);
    return;
  }
  const auto write = [&](auto fp8) {
    constexpr bool kFp8 = decltype(fp8)::value;
#pragma unroll
    for (int k = 0; k < kLinePacks; ++k) {
      const HalfQuotient& d = divide[k / kParts];
      if (nan_bits<T>(row[k]) > 0x7F800000u) {
        rare_pack<T>(from + k * kPartElements * sizeof(T), to + k * kPartElements, d.scale, kFp8,
                     p.soft);
        continue;
      }
      *reinterpret_cast<uint2*>(to + k * kPartElements) =
          make_uint2(four_half_codes<T>(row[k].word[0], row[k].word[1], d, kFp8),
                     four_half_codes<T>(row[k].word[2], row[k].word[3], d, kFp8));
    }
  };
  if (p.fp8) {
    write(std::true_type());
  } else {
    write(std::false_type());
  }
}

// ---- host
// A block of write_lines_kernel: the lanes of a token by as many tokens as make whole warps.
inline dim3 lines_block(int64_t heads, int64_t dim) {
  const unsigned width = static_cast<unsigned>(heads * dim / (kLinePacks * kPackElements));
  unsigned height = kLineThreads / width > 1 ? kLineThreads / width : 1;
  while (height * width % 32 != 0) ++height;
  return dim3(width, height);
}

// For tokens that rows_fit().
inline bool lines_fit(const cpu::CacheWriteParams& p) {
  const cpu::CacheSide& k = p.key;
  if (k.scale.dynamic || (p.dim != 64 && p.dim != 128 && p.dim != 256) ||
      p.heads * p.dim % kGroupElements != 0 || (p.block_size & (p.block_size - 1)) != 0)
    return false;
  const bool adjacent = p.heads == 1 || (k.token_head_stride == p.dim && k.head_stride == p.dim);
  const dim3 block = lines_block(p.heads, p.dim);
  return adjacent && block.x * block.y <= kMostLineThreads;
}

template <class T>
int write_lines(const cpu::CacheWriteParams& p, int64_t tokens, bool soft, void* stream) {
  const cpu::CacheSide* sides[2] = {&p.key, &p.value};
  LinesParams r{};
  for (int i = 0; i < 2; ++i) {
    const cpu::CacheSide& s = *sides[i];
    r.side[i] = {static_cast<const char*>(s.tokens), static_cast<char*>(s.cache), s.scale.data,
                 s.token_stride * static_cast<int64_t>(sizeof(T)), s.block_stride};
  }
  r.slots = Indices(p.slots, p.slot_dtype, p.slot_stride);
  r.tokens = static_cast<uint32_t>(tokens);
  r.position_stride = static_cast<uint32_t>(p.key.position_stride);
  r.scale_head = static_cast<uint32_t>(p.key.scale.head);
  while (int64_t{1} << r.block_shift < p.block_size) ++r.block_shift;
  r.fp8 = p.cache_dtype == DType::f8e4m3, r.soft = soft;
  const dim3 block = lines_block(p.heads, p.dim);
  const dim3 grid(static_cast<unsigned>(ceil_div(tokens, block.y)), 2);
  return launch(p.dim == 64    ? write_lines_kernel<T, 1>
                : p.dim == 128 ? write_lines_kernel<T, 2>
                               : write_lines_kernel<T, 4>,
                grid, block, 0, stream, r);
}

}  // namespace fastinfer::cuda
