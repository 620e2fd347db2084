// What the two rotary kernels (rotary.cu, rotary_dense.cu) share: layout of the work, the rotation.
#pragma once

#include "../common/row_group.cuh"
#include "rotary.h"

namespace fastinfer::cuda {

constexpr int kRotaryThreads = 256, kRotaryHeads = 2;

// A block is `width` threads on each of `tokens` tokens; `groups` groups of lanes share the heads
// of a token, each taking one or (much work: cos and sin are then loaded once for all) `most` of
// them, and a block has as many tokens as fill `threads` threads.
struct RotaryLayout {
  int groups, width, tokens, parts;
};

constexpr RotaryLayout rotary_layout(int64_t tokens, int64_t heads, int lanes, int sms,
                                     int most = kRotaryHeads, int threads = kRotaryThreads) {
  const bool much = tokens * heads * lanes > int64_t{sms} * 4 * kRotaryThreads;
  const int groups = static_cast<int>(much ? (heads + most - 1) / most : heads);
  const int64_t need = (int64_t{groups} * lanes + 31) / 32 * 32;
  const int widest = much ? kRotaryThreads : 64;
  const int width = static_cast<int>(need < widest ? need : widest);
  return {groups, width, much && width < threads ? threads / width : 1,
          static_cast<int>((need + width - 1) / width)};
}

static_assert(rotary_layout(1, 40, 8, 132).parts == 5, "one token: five blocks");
static_assert(rotary_layout(8192, 40, 8, 132).width == 160, "20 groups of 8 lanes, 2 heads each");
static_assert(rotary_layout(8192, 48, 8, 132, 3, 128).tokens == 1, "16 groups of 8 lanes, 3 heads");

// Pairs of (x, y), or with `interleaved` of neighbours within x and within y, turned by the angles
// of c and s.
template <int kSize>
__device__ __forceinline__ void rotate(float (&x)[kSize], float (&y)[kSize],
                                       const float (&c)[kSize], const float (&s)[kSize],
                                       bool interleaved) {
  if (interleaved) {
#pragma unroll
    for (int j = 0; j < kSize / 2; ++j) {
      const int k = j + kSize / 2;
      const float u = x[2 * j] * c[j] - x[2 * j + 1] * s[j];
      x[2 * j + 1] = x[2 * j + 1] * c[j] + x[2 * j] * s[j];
      const float v = y[2 * j] * c[k] - y[2 * j + 1] * s[k];
      y[2 * j + 1] = y[2 * j + 1] * c[k] + y[2 * j] * s[k];
      x[2 * j] = u, y[2 * j] = v;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float u = x[j] * c[j] - y[j] * s[j];
      y[j] = y[j] * c[j] + x[j] * s[j];
      x[j] = u;
    }
  }
}

template <class E>
__device__ __forceinline__ void rotate(uint4& first, uint4& second,
                                       const float (&c)[Pack<E>::kSize],
                                       const float (&s)[Pack<E>::kSize], bool interleaved) {
  float x[Pack<E>::kSize], y[Pack<E>::kSize];
  unpack<E>(x, first);
  unpack<E>(y, second);
  rotate(x, y, c, s, interleaved);
  first = pack_of<E>(x);
  second = pack_of<E>(y);
}

// Can everything of its kind be moved in packs of 16 bytes?
struct RotaryFit {
  bool packs, table_packs, cache_packs;  // tensors, tables, both caches
  bool soft;                             // e4m3 by integer arithmetic
};

// rotary_dense.cu: launches where its form fits and returns true; `error` is then what the launch
// gave.
bool rotary_dense(const cpu::RotaryParams& p, const cpu::CacheWriteParams* write, int64_t tokens,
                  const RotaryFit& fit, void* stream, int& error);

}  // namespace fastinfer::cuda
