// Rows of D elements between tensors and fp32 scratch: loading keys and values through the page
// resolver, queries, outputs, and rotary embedding of one row. D is a multiple of 8.
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

// Rows of a tile in fp32; row i of the tile at rows + i * stride.
struct TileRows {
  const float* rows;
  int64_t stride;
};

struct KeySource {
  const KeyValue& t;
  int64_t base, scale_base;  // element offsets of key 0 (dense) or 0
  const int32_t* pages;
  int64_t page_size, head, dim;
};

template <class E>
void convert_rows(const KeySource& src, int64_t tile, int64_t begin, int64_t end, float* out) {
  const int64_t stride = padded_dim(src.dim);
  for (int64_t key = begin; key < end;) {
    const int64_t page = key / src.page_size, slot = key % src.page_size;
    const int64_t block = src.pages ? src.pages[page] : 0;
    const int64_t left = src.page_size - slot, stop = end - key > left ? key + left : end;
    const char* row =
        (const char*)src.t.data +
        (src.base + block * src.t.page + slot * src.t.token + src.head * src.t.head) * E::size;
    const float* scale = src.t.scale_per_token
                             ? src.t.scale + src.scale_base + block * src.t.scale_page +
                                   slot * src.t.scale_token + src.head * src.t.scale_head
                             : nullptr;
    for (; key < stop; ++key) {
      load_row<E>(row, src.dim, scale ? *scale : 1.0f, out + (key - tile) * stride);
      row += src.t.token * E::size;
      if (scale) scale += src.t.scale_token;
    }
  }
}

// Keys [begin, end) of the tile that starts at `tile`; other rows of it are not to be read, unless
// `whole`: then they are zeros. fp32 rows in one page are used where they lie.
inline TileRows tile_rows(const KeySource& src, DType type, int64_t tile, int64_t begin,
                          int64_t end, bool whole, float* scratch) {
  const int64_t stride = padded_dim(src.dim);
  if (type == DType::f32 && begin / src.page_size == (end - 1) / src.page_size &&
      (whole ? end - begin == kTile : stride == src.dim)) {
    const int64_t page = begin / src.page_size, block = src.pages ? src.pages[page] : 0;
    return {(const float*)src.t.data + src.base + block * src.t.page +
                (tile - page * src.page_size) * src.t.token + src.head * src.t.head,
            src.t.token};
  }
  if (whole) {
    __builtin_memset(scratch, 0, (begin - tile) * stride * 4);
    __builtin_memset(scratch + (end - tile) * stride, 0, (tile + kTile - end) * stride * 4);
  }
  switch (type) {
    case DType::f32:
      convert_rows<Elem<DType::f32>>(src, tile, begin, end, scratch);
      break;
    case DType::f16:
      convert_rows<Elem<DType::f16>>(src, tile, begin, end, scratch);
      break;
    case DType::bf16:
      convert_rows<Elem<DType::bf16>>(src, tile, begin, end, scratch);
      break;
    case DType::f8e4m3:
      convert_rows<Elem<DType::f8e4m3>>(src, tile, begin, end, scratch);
      break;
    default:
      convert_rows<Elem<DType::i8>>(src, tile, begin, end, scratch);
  }
  return {scratch, stride};
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
