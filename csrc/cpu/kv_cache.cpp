// Cache write and gather, token by token (paged layout of Kwon et al. 2023).
//
//   float cache: bytes are copied (the gather may convert to another float type)
//   8-bit cache: code = round_to_nearest_even(x / scale), saturating at 127 (int8) or 448 (e4m3);
//                value = code * scale. A dynamic scale is absmax / 127 or absmax / 448 of the
//                token's head, 1 where that is 0, NaN where the head holds inf or NaN.
//
// The arithmetic is fp32 with IEEE divisions: codes and scales do not depend on the ISA level.
#include "kv_cache.h"

#include "simd.h"

namespace fastinfer::cpu::FI_ISA {
namespace {

inline int64_t index(const void* p, DType t, int64_t i) {
  return t == DType::i64 ? static_cast<const int64_t*>(p)[i] : static_cast<const int32_t*>(p)[i];
}

inline char* at(void* base, int64_t elements, int64_t size) {
  return static_cast<char*>(base) + elements * size;
}

// Largest |x|; NaN when x holds inf or NaN.
template <class E>
float absmax(const char* x, int64_t dim) {
  vf top{}, poison{};
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    const vf v = E::load(x, i);
    top = vmax(top, vabs(v));
    poison += v - v;  // 0, or NaN from the first inf or NaN on
  }
  if (i < dim) {
    const vf v = load_partial<E>(x, i, dim - i);
    top = vmax(top, vabs(v));
    poison += v - v;
  }
  const float bad = sum(poison);
  return bad == bad ? max(top) : __builtin_nanf("");
}

template <class E, class C>
void write_head(const char* x, char* codes, const ScaleView& scale, int64_t where, int64_t dim) {
  if (scale.dynamic) {
    const float s = absmax<E>(x, dim) / (C::is_fp8 ? 448.0f : 127.0f);
    scale.data[where] = s == 0.0f ? 1.0f : s;
  }
  const vf s = splat(scale.data[where]);
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) C::store(codes, i, E::load(x, i) / s);
  if (i < dim) store_partial<C>(codes, i, dim - i, load_partial<E>(x, i, dim - i) / s);
}

struct Fp8Codes : Elem<DType::f8e4m3> {
  static constexpr bool is_fp8 = true;
};
struct Int8Codes : Elem<DType::i8> {
  static constexpr bool is_fp8 = false;
};

void write_side(const CacheWriteParams& p, const CacheSide& side, int64_t t, int64_t slot) {
  const int64_t block = slot / p.block_size, position = slot % p.block_size;
  const int64_t size = dtype_size(p.token_dtype), cache_size = dtype_size(p.cache_dtype);
  const char* x = at(side.tokens, t * side.token_stride, size);
  char* y = at(side.cache, block * side.block_stride + position * side.position_stride, cache_size);
  const ScaleView& scale = side.scale;
  if (!scale.data) {
    if (side.token_head_stride == p.dim && side.head_stride == p.dim) {
      __builtin_memcpy(y, x, p.heads * p.dim * size);
      return;
    }
    for (int64_t h = 0; h < p.heads; ++h)
      __builtin_memcpy(y + h * side.head_stride * size, x + h * side.token_head_stride * size,
                       p.dim * size);
    return;
  }
  with_float(p.token_dtype, [&](auto e) {
    using E = decltype(e);
    for (int64_t h = 0; h < p.heads; ++h) {
      const char* from = x + h * side.token_head_stride * size;
      char* to = y + h * side.head_stride;
      const int64_t where = block * scale.block + position * scale.position + h * scale.head;
      if (p.cache_dtype == DType::i8) {
        write_head<E, Int8Codes>(from, to, scale, where, p.dim);
      } else {
        write_head<E, Fp8Codes>(from, to, scale, where, p.dim);
      }
    }
  });
}

template <class C, class E>
void convert(const char* x, char* y, float s, int64_t dim) {
  const vf scale = splat(s);
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) E::store(y, i, C::load(x, i) * scale);
  if (i < dim) store_partial<E>(y, i, dim - i, load_partial<C>(x, i, dim - i) * scale);
}

template <class E>
void convert_head(DType cache_dtype, const char* x, char* y, float scale, int64_t dim) {
  if (cache_dtype == DType::i8) return convert<Elem<DType::i8>, E>(x, y, scale, dim);
  if (cache_dtype == DType::f8e4m3) return convert<Elem<DType::f8e4m3>, E>(x, y, scale, dim);
  with_float(cache_dtype, [&](auto c) { convert<decltype(c), E>(x, y, scale, dim); });
}

void gather_side(const CacheGatherParams& p, const CacheSide& side, int64_t t, int64_t block,
                 int64_t position) {
  const int64_t size = dtype_size(p.token_dtype), cache_size = dtype_size(p.cache_dtype);
  const char* x =
      at(side.cache, block * side.block_stride + position * side.position_stride, cache_size);
  char* y = at(side.tokens, t * side.token_stride, size);
  for (int64_t h = 0; h < p.heads; ++h) {
    const char* from = x + h * side.head_stride * cache_size;
    char* to = y + h * side.token_head_stride * size;
    if (p.cache_dtype == p.token_dtype) {
      __builtin_memcpy(to, from, p.dim * size);
      continue;
    }
    const ScaleView& s = side.scale;
    const float scale =
        s.data ? s.data[block * s.block + position * s.position + h * s.head] : 1.0f;
    with_float(p.token_dtype,
               [&](auto e) { convert_head<decltype(e)>(p.cache_dtype, from, to, scale, p.dim); });
  }
}

void zero_side(const CacheGatherParams& p, const CacheSide& side, int64_t t) {
  const int64_t size = dtype_size(p.token_dtype);
  for (int64_t h = 0; h < p.heads; ++h)
    __builtin_memset(at(side.tokens, t * side.token_stride + h * side.token_head_stride, size), 0,
                     p.dim * size);
}

}  // namespace

void write_cache(const CacheWriteParams& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const int64_t slot = index(p.slots, p.slot_dtype, t * p.slot_stride);
    if (slot < 0) continue;
    write_side(p, p.key, t, slot);
    write_side(p, p.value, t, slot);
  }
}

void gather_cache(const CacheGatherParams& p, int64_t begin, int64_t end) {
  auto first_token = [&](int64_t b) { return index(p.cu_seqlens, p.cu_dtype, b * p.cu_stride); };
  // Largest b with first_token(b) <= begin; batch stands for the tokens past the last sequence.
  int64_t b = 0;
  for (int64_t high = p.batch + 1; high - b > 1;) {
    const int64_t mid = b + (high - b) / 2;
    if (first_token(mid) <= begin) {
      b = mid;
    } else {
      high = mid;
    }
  }
  for (int64_t t = begin; t < end; ++t) {
    while (b < p.batch && first_token(b + 1) <= t) ++b;
    if (b == p.batch) {
      zero_side(p, p.key, t);
      zero_side(p, p.value, t);
      continue;
    }
    const int64_t start =
        p.seq_starts ? index(p.seq_starts, p.starts_dtype, b * p.starts_stride) : 0;
    const int64_t at_position = start + t - first_token(b);
    const int64_t block =
        index(p.block_table, p.table_dtype,
              b * p.table_row_stride + at_position / p.block_size * p.table_col_stride);
    gather_side(p, p.key, t, block, at_position % p.block_size);
    gather_side(p, p.value, t, block, at_position % p.block_size);
  }
}

}  // namespace fastinfer::cpu::FI_ISA
