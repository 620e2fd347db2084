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

// A pack of a row that ends at n (0 beyond), i < n, with a small element path: a rolled loop that
// shifts elements in and out of the pack, where the unrolled one costs a kernel with several packs
// half its registers.
template <class E>
__device__ __forceinline__ uint4 load_pack(const E* row, int i, int n, bool packs) {
  if (packs) return *reinterpret_cast<const uint4*>(row + i);
  constexpr int kBits = 8 * sizeof(E);
  using Raw = std::conditional_t<sizeof(E) == 4, uint32_t, uint16_t>;
  uint64_t low = 0, high = 0;
#pragma unroll 1
  for (int j = min(n - i, Pack<E>::kSize) - 1; j >= 0; --j) {
    high = high << kBits | low >> (64 - kBits);
    low = low << kBits | reinterpret_cast<const Raw*>(row)[i + j];
  }
  return make_uint4(static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32),
                    static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32));
}

template <class E>
__device__ __forceinline__ void store_pack(E* row, int i, int n, bool packs, const uint4& raw) {
  if (packs) {
    *reinterpret_cast<uint4*>(row + i) = raw;
    return;
  }
  constexpr int kBits = 8 * sizeof(E);
  using Raw = std::conditional_t<sizeof(E) == 4, uint32_t, uint16_t>;
  uint64_t low = static_cast<uint64_t>(raw.y) << 32 | raw.x;
  uint64_t high = static_cast<uint64_t>(raw.w) << 32 | raw.z;
  const int count = min(n - i, Pack<E>::kSize);
#pragma unroll 1
  for (int j = 0; j < count; ++j) {
    reinterpret_cast<Raw*>(row)[i + j] = static_cast<Raw>(low);
    low = low >> kBits | high << (64 - kBits);
    high >>= kBits;
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

// Half a pack of a 16-bit type.
template <class T>
__device__ __forceinline__ void unpack(float (&v)[4], const uint2& raw) {
  static_assert(sizeof(T) == 2, "four elements in eight bytes");
  float eight[8];
  unpack<T>(eight, make_uint4(raw.x, raw.y, 0, 0));
#pragma unroll
  for (int j = 0; j < 4; ++j) v[j] = eight[j];
}
template <class T>
__device__ __forceinline__ uint2 half_pack_of(const float (&v)[4]) {
  static_assert(sizeof(T) == 2, "four elements in eight bytes");
  const uint4 pack = pack_of<T>({v[0], v[1], v[2], v[3], 0.0f, 0.0f, 0.0f, 0.0f});
  return make_uint2(pack.x, pack.y);
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
