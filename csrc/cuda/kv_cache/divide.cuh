// Division of numbers below 2^31 by a divisor known at launch: a multiplication and a shift
// (Granlund and Montgomery 1994), and index arrays of either width without a branch around the
// load.
#pragma once

#include <cstdint>

#include "../../cpu/dtype.h"

namespace fastinfer::cuda {

struct Divisor {
  uint32_t value, multiplier, shift;

  Divisor() = default;
  explicit Divisor(int64_t d) : value(static_cast<uint32_t>(d)), multiplier(0), shift(0) {
    if (d <= 1) return;
    int log = 0;
    while ((int64_t{1} << log) < d) ++log;
    const uint64_t power = uint64_t{1} << (31 + log);
    multiplier = static_cast<uint32_t>((power + value - 1) / value);
    shift = static_cast<uint32_t>(log - 1);
  }
#ifdef __CUDACC__
  // n / value; `rest` becomes n % value.
  __device__ __forceinline__ uint32_t operator()(uint32_t n, uint32_t& rest) const {
    const uint32_t q = value == 1 ? n : __umulhi(n, multiplier) >> shift;
    rest = n - q * value;
    return q;
  }
#endif
};

// An int32 or int64 array with a stride, read as 32-bit words.
struct Indices {
  const uint32_t* words;
  int64_t step;  // words from one value to the next
  bool wide;

  Indices() = default;
  Indices(const void* p, DType type, int64_t stride)
      : words(static_cast<const uint32_t*>(p)),
        step(type == DType::i64 ? 2 * stride : stride),
        wide(type == DType::i64) {}
#ifdef __CUDACC__
  __device__ __forceinline__ int64_t operator[](int64_t i) const {
    const uint32_t* p = words + i * step;
    const uint32_t low = p[0];
    uint32_t high = static_cast<uint32_t>(static_cast<int32_t>(low) >> 31);
    if (wide) high = p[1];
    return static_cast<int64_t>(static_cast<uint64_t>(high) << 32 | low);
  }
#endif
};

}  // namespace fastinfer::cuda
