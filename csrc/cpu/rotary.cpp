// Rotary position embedding (Su et al. 2021): with c, s = cos, sin[position, i]
//
//   a' = a c - b s      half-split:  a = x[i],  b = x[i + half]
//   b' = b c + a s      interleaved: a = x[2i], b = x[2i + 1]
//
// in fp32 with one rounding to the element type; columns from 2 * half on are copied. In place when
// out == in: a pair of vectors is loaded whole before either is stored.
#include "rotary.h"

#include "simd.h"

namespace fastinfer::cpu::FI_ISA {
namespace {

// The even and odd elements of two vectors in a row, and back.
#if defined(__AVX512F__)
#define FI_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define FI_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define FI_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define FI_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define FI_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define FI_ODD 1, 3, 5, 7, 9, 11, 13, 15
#define FI_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define FI_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define FI_EVEN 0, 2, 4, 6
#define FI_ODD 1, 3, 5, 7
#define FI_LOW 0, 4, 1, 5
#define FI_HIGH 2, 6, 3, 7
#endif

// GCC has __builtin_shufflevector only from version 12 on.
#if defined(__clang__)
#define FI_SHUFFLE(u, v, ...) __builtin_shufflevector(u, v, __VA_ARGS__)
#else
#define FI_SHUFFLE(u, v, ...) __builtin_shuffle(u, v, vi{__VA_ARGS__})
#endif

template <class E, class C>
void rotate_split(const char* x, char* y, const void* cos, const void* sin, int64_t half) {
  const char* x2 = x + half * E::size;
  char* y2 = y + half * E::size;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const vf a = E::load(x, i), b = E::load(x2, i), c = C::load(cos, i), s = C::load(sin, i);
    E::store(y, i, a * c - b * s);
    E::store(y2, i, b * c + a * s);
  }
  if (const int64_t n = half - i) {
    const vf a = load_partial<E>(x, i, n), b = load_partial<E>(x2, i, n);
    const vf c = load_partial<C>(cos, i, n), s = load_partial<C>(sin, i, n);
    store_partial<E>(y, i, n, a * c - b * s);
    store_partial<E>(y2, i, n, b * c + a * s);
  }
}

template <class E, class C>
void rotate_pairs(const char* x, char* y, const void* cos, const void* sin, int64_t half) {
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const vf u = E::load(x, 2 * i), v = E::load(x, 2 * i + kLanes);
    const vf a = FI_SHUFFLE(u, v, FI_EVEN), b = FI_SHUFFLE(u, v, FI_ODD);
    const vf c = C::load(cos, i), s = C::load(sin, i);
    const vf first = a * c - b * s, second = b * c + a * s;
    E::store(y, 2 * i, FI_SHUFFLE(first, second, FI_LOW));
    E::store(y, 2 * i + kLanes, FI_SHUFFLE(first, second, FI_HIGH));
  }
  for (; i < half; ++i) {
    const float a = E::get(x, 2 * i), b = E::get(x, 2 * i + 1);
    const float c = C::get(cos, i), s = C::get(sin, i);
    E::set(y, 2 * i, a * c - b * s);
    E::set(y, 2 * i + 1, b * c + a * s);
  }
}

template <class E, class C>
void rotate_tensor(const RotaryParams& p, const RotaryTensor& t, int64_t b, int64_t s,
                   const char* cos, const char* sin) {
  if (!t.in) return;
  const int64_t rotated = 2 * p.half;
  for (int64_t h = 0; h < t.heads; ++h) {
    const char* x = static_cast<const char*>(t.in) +
                    (b * t.in_batch + s * t.in_token + h * t.in_head) * E::size;
    char* y =
        static_cast<char*>(t.out) + (b * t.out_batch + s * t.out_token + h * t.out_head) * E::size;
    if (p.interleaved) {
      rotate_pairs<E, C>(x, y, cos, sin, p.half);
    } else {
      rotate_split<E, C>(x, y, cos, sin, p.half);
    }
    if (x != y && rotated < p.dim)
      __builtin_memcpy(y + rotated * E::size, x + rotated * E::size, (p.dim - rotated) * E::size);
  }
}

template <class E, class C>
void rotate_tokens(const RotaryParams& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const int64_t b = t / p.seq, s = t % p.seq;
    int64_t position = s;
    if (p.positions) {
      const int64_t i = b * p.position_batch + s * p.position_token;
      position = p.position_dtype == DType::i64 ? static_cast<const int64_t*>(p.positions)[i]
                                                : static_cast<const int32_t*>(p.positions)[i];
    }
    const char* cos = static_cast<const char*>(p.cos) + position * p.cos_stride * C::size;
    const char* sin = static_cast<const char*>(p.sin) + position * p.sin_stride * C::size;
    rotate_tensor<E, C>(p, p.q, b, s, cos, sin);
    rotate_tensor<E, C>(p, p.k, b, s, cos, sin);
  }
}

}  // namespace

void rotary(const RotaryParams& p, int64_t begin, int64_t end) {
  with_float(p.dtype, [&](auto e) {
    using E = decltype(e);
    if (p.table_dtype == DType::f32) {
      rotate_tokens<E, Elem<DType::f32>>(p, begin, end);
    } else {
      rotate_tokens<E, E>(p, begin, end);
    }
  });
}

}  // namespace fastinfer::cpu::FI_ISA
