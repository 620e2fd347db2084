// Rows of D elements between tensors and scratch: keys and values through the page resolver,
// queries, outputs, and rotary embedding of one row. D is a multiple of 8.
#pragma once

#include "attention.h"
#include "simd.h"

namespace fastinfer::cpu {
namespace {

// A 16-lane level meets one half vector at the end when D % 16 == 8.
template <class E>
FI_INLINE vf load_tail8(const void* p, int64_t i) {
  char whole[kLanes * 4] = {};
  __builtin_memcpy(whole, (const char*)p + i * E::size, 8 * E::size);
  return E::load(whole, 0);
}
template <class E>
FI_INLINE void store_tail8(void* p, int64_t i, vf v) {
  char whole[kLanes * 4];
  E::store(whole, 0, v);
  __builtin_memcpy((char*)p + i * E::size, whole, 8 * E::size);
}

// out[0 .. padded_dim) = row * factor, zeros behind dim.
template <class E>
FI_INLINE void load_row(const void* row, int64_t dim, float factor, float* out) {
  const int64_t full = dim / kLanes * kLanes;
  for (int64_t i = 0; i < full; i += kLanes) store_raw(out + i, E::load(row, i) * factor);
  if constexpr (kLanes == 16)
    if (full < dim) store_raw(out + full, load_tail8<E>(row, full) * factor);
  if (kLanes < 16 && dim < padded_dim(dim))
    for (int64_t i = dim; i < padded_dim(dim); i += kLanes) store_raw(out + i, vf{});
}
template <class E>
FI_INLINE void store_row(void* row, int64_t dim, float factor, const float* x) {
  const int64_t full = dim / kLanes * kLanes;
  for (int64_t i = 0; i < full; i += kLanes) E::store(row, i, load_raw<vf>(x + i) * factor);
  if constexpr (kLanes == 16)
    if (full < dim) store_tail8<E>(row, full, load_raw<vf>(x + full) * factor);
}

// Where the keys or the values of one sequence and head are.
struct KeySource {
  const KeyValue& t;
  int64_t base, scale_base;  // element offsets of key 0 (dense) or 0
  const int32_t* pages;
  int64_t page_size, head, dim, size;  // size: bytes of an element
};

// Rows of a tile: row i at rows + i * stride, in elements of the tensor or of the scratch.
struct TileRows {
  const char* rows;
  int64_t stride;
};

// f(row, scale, key, count) for runs of keys [key, key + count) that lie in one page.
template <class F>
FI_INLINE void for_runs(const KeySource& src, int64_t begin, int64_t end, F f) {
  for (int64_t key = begin; key < end;) {
    const int64_t page = src.pages ? key / src.page_size : 0, slot = key - page * src.page_size;
    const int64_t block = src.pages ? src.pages[page] : 0;
    const int64_t left = src.page_size - slot, count = end - key < left ? end - key : left;
    const char* row =
        (const char*)src.t.data +
        (src.base + block * src.t.page + slot * src.t.token + src.head * src.t.head) * src.size;
    const float* scale = src.t.scale_per_token
                             ? src.t.scale + src.scale_base + block * src.t.scale_page +
                                   slot * src.t.scale_token + src.head * src.t.scale_head
                             : nullptr;
    f(row, scale, key, count);
    key += count;
  }
}

FI_INLINE bool one_page(const KeySource& src, int64_t begin, int64_t end) {
  return !src.pages || begin / src.page_size == (end - 1) / src.page_size;
}

// Row `tile` of a tile whose keys [begin, end) lie in one page; an address, maybe not a valid one.
FI_INLINE TileRows rows_in_place(const KeySource& src, int64_t tile, int64_t begin) {
  TileRows in_place{nullptr, src.t.token};
  for_runs(src, begin, begin + 1, [&](const char* row, const float*, int64_t, int64_t) {
    in_place.rows = row - (begin - tile) * src.t.token * src.size;
  });
  return in_place;
}

// All rows of a tile as they are, for transposition: keys outside [begin, end) are not touched but
// zero. The scales of its keys, if per token, go to `scales`.
inline TileRows raw_tile(const KeySource& src, int64_t tile, int64_t begin, int64_t end,
                         char* scratch, float* scales) {
  const int64_t bytes = src.dim * src.size, stride = padded_dim(src.dim);
  const bool in_place = end - begin == kTile && bytes % 16 == 0 && one_page(src, begin, end);
  if (src.t.scale_per_token || !in_place) {
    __builtin_memset(scales, 0, kTile * 4);
    if (end - begin < kTile || stride != src.dim)
      __builtin_memset(scratch, 0, kTile * stride * src.size);
    for_runs(src, begin, end, [&](const char* row, const float* scale, int64_t key, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        if (!in_place)
          __builtin_memcpy(scratch + (key - tile + i) * stride * src.size,
                           row + i * src.t.token * src.size, bytes);
        if (scale) scales[key - tile + i] = scale[i * src.t.scale_token];
      }
    });
  }
  return in_place ? rows_in_place(src, tile, begin) : TileRows{scratch, stride};
}

// Keys [begin, end) of a tile in fp32, times their scales if those are per token.
template <class E>
void convert_tile(const KeySource& src, int64_t tile, int64_t begin, int64_t end, float* out) {
  const int64_t stride = padded_dim(src.dim);
  for_runs(src, begin, end, [&](const char* row, const float* scale, int64_t key, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
      load_row<E>(row + i * src.t.token * E::size, src.dim,
                  scale ? scale[i * src.t.scale_token] : 1.0f, out + (key - tile + i) * stride);
  });
}

// f(Elem<T>{}) for the element type of keys and values.
template <class F>
FI_INLINE void with_key_type(DType t, F&& f) {
  if (t == DType::f8e4m3)
    f(Elem<DType::f8e4m3>{});
  else if (t == DType::i8)
    f(Elem<DType::i8>{});
  else
    with_float(t, f);
}

// Rotary embedding of the first `table.dim` elements at `position`, in fp32 (Su et al. 2021):
// pairs (i, i + dim/2), or (2i, 2i + 1) when interleaved.
inline void rotate_row(const RotaryTable& table, int64_t position, float* x) {
  const int64_t half = table.dim / 2;
  const int64_t step = table.interleaved ? 2 : 1, apart = table.interleaved ? 1 : half;
  with_float(table.dtype, [&](auto e) {
    using E = decltype(e);
    const char* cos = (const char*)table.cos + position * table.cos_stride * E::size;
    const char* sin = (const char*)table.sin + position * table.sin_stride * E::size;
    for (int64_t i = 0; i < half; ++i) {
      const float c = E::get(cos, i), s = E::get(sin, i);
      const float a = x[i * step], b = x[i * step + apart];
      x[i * step] = a * c - b * s;
      x[i * step + apart] = b * c + a * s;
    }
  });
}

// x rounded to E and back.
template <class E>
FI_INLINE void round_row(int64_t dim, float* x) {
  for (int64_t i = 0; i < dim; ++i) {
    alignas(4) char element[4];
    E::set(element, 0, x[i]);
    x[i] = E::get(element, 0);
  }
}

}  // namespace
}  // namespace fastinfer::cpu
