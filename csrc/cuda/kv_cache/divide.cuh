// Division of numbers below 2^31 by a divisor known at launch: a multiplication and a shift
// (Granlund and Montgomery 1994), and index arrays of either width.
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

// An int32 or int64 array with a stride.
struct Indices {
  const void* data;
  int64_t step;
  bool wide;

  Indices() = default;
  Indices(const void* p, DType type, int64_t stride)
      : data(p), step(stride), wide(type == DType::i64) {}
#ifdef __CUDACC__
  __device__ __forceinline__ int64_t operator[](int64_t i) const {
    if (wide) return static_cast<const int64_t*>(data)[i * step];
    return static_cast<const int32_t*>(data)[i * step];
  }
#endif
};

}  // namespace fastinfer::cuda
