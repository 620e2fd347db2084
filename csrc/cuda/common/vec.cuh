// 16-byte accesses. A row whose address and length allow it is moved in packs of 16 bytes; any
// other row goes through the same code element by element, so that a kernel has one loop for both.
// Whether packs are possible is decided once per launch (packs_fit) and passed in as a uniform
// flag.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "dtype.cuh"

namespace fastinfer::cuda {

template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};

// Elements [i, i + kSize) of a row that ends at n; what lies past n is 0. i is a multiple of kSize.
template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* row, int64_t i, int64_t n, bool packs) {
  Pack<T> pack;
  if (packs) {
    *reinterpret_cast<uint4*>(&pack) = *reinterpret_cast<const uint4*>(row + i);
  } else {
#pragma unroll
    for (int j = 0; j < Pack<T>::kSize; ++j) pack.v[j] = i + j < n ? row[i + j] : T{};
  }
  return pack;
}

template <class T>
__device__ __forceinline__ void store_pack(T* row, int64_t i, int64_t n, bool packs,
                                           const Pack<T>& pack) {
  if (packs) {
    *reinterpret_cast<uint4*>(row + i) = *reinterpret_cast<const uint4*>(&pack);
  } else {
#pragma unroll
    for (int j = 0; j < Pack<T>::kSize; ++j)
      if (i + j < n) row[i + j] = pack.v[j];
  }
}

// Host side: may rows of n elements starting at `data` plus multiples of the strides (in elements)
// be moved in packs?
inline bool packs_fit(const void* data, int64_t n, int64_t element_size,
                      std::initializer_list<int64_t> strides) {
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || n * element_size % 16 != 0) return false;
  for (int64_t s : strides)
    if (s * element_size % 16 != 0) return false;
  return true;
}

}  // namespace fastinfer::cuda
