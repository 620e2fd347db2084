// 16-byte accesses. A row whose address and length allow it is moved in packs of 16 bytes; any
// other row goes through the same code element by element, so that a kernel has one loop for both.
// Whether packs are possible is decided once per launch (packs_fit) and passed in as a uniform
// flag.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

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

// A pack as fp32 values, and back (two conversions per instruction). The pack is a plain uint4: the
// compiler takes a struct of 16-bit elements apart right after its load, and so waits for it there.
template <class T>
__device__ __forceinline__ void unpack(float (&v)[Pack<T>::kSize], const uint4& raw) {
  const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 4) {
      v[w] = __uint_as_float(word[w]);
    } else if constexpr (std::is_same_v<T, __half>) {
      const float2 two = __half22float2(*reinterpret_cast<const __half2*>(&word[w]));
      v[2 * w] = two.x, v[2 * w + 1] = two.y;
    } else {
      v[2 * w] = __uint_as_float(word[w] << 16);
      v[2 * w + 1] = __uint_as_float(word[w] & 0xFFFF0000u);
    }
  }
}

template <class T>
__device__ __forceinline__ uint4 pack_of(const float (&v)[Pack<T>::kSize]) {
  uint32_t word[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 4) {
      word[w] = __float_as_uint(v[w]);
    } else if constexpr (std::is_same_v<T, __half>) {
      const __half2 two = __floats2half2_rn(v[2 * w], v[2 * w + 1]);
      word[w] = *reinterpret_cast<const uint32_t*>(&two);
    } else {
      const __nv_bfloat162 two = __floats2bfloat162_rn(v[2 * w], v[2 * w + 1]);
      word[w] = *reinterpret_cast<const uint32_t*>(&two);
    }
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
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
