// int4_linear, int8_linear with int8 activations (FASTINFER_CPU_INT8_ACTIVATIONS=1):
//
//   per token and run of columns:  sx = absmax / 127,  xq = rne(x / sx)      (a run: see kRunInt8)
//     d  = sum_k q xq - z sum_k xq                         exact, in int32
//     y += (float(d) * sx) * s,  with float zeros also  y += zf * (sx * float(sum_k xq))   in fp32
//
// Lanes are output channels, as in linear_packed.cpp. Four codes of a channel sit in one 32-bit
// lane: an 8-bit word as it stands, a 4-bit word as its even and its odd nibbles, so xq is staged
// [k_pad / per_word][T][per_word] with the even columns of a 4-bit word first. vpdpbusd takes the
// four products at once; other levels widen to 16 bits and use pmaddwd. Sums of integers are exact
// in any order, products are kept from fusing with the addition that follows, and the order over
// runs is fixed: every ISA level, M and number of threads gives the same bits.
// A token holding NaN or inf gets sx = NaN in that run, hence NaN in its whole row and nowhere
// else.
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "linear_epilogue.h"
#include "quantize_row.h"

namespace fastinfer::cpu::FI_ISA {
namespace {

#if defined(__AVX512VNNI__)
FI_INLINE vi dot4(vi acc, vu codes, vi x) {
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, (__m512i)x);
}
#else
typedef int16_t vs __attribute__((vector_size(kLanes * 4)));
FI_INLINE vi multiply_pairs(vs a, vs b) {
#if defined(__AVX512F__)
  return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  vi sum;
  for (int i = 0; i < kLanes; ++i) sum[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return sum;
#endif
}
FI_INLINE vi dot4(vi acc, vu codes, vi x) {
  const vs even = (vs)((vu)x << 8 & 0xff00ff00u) >> 8, odd = (vs)x >> 8;
  return acc + multiply_pairs((vs)(codes & 0x00ff00ffu), even) +
         multiply_pairs((vs)(codes >> 8 & 0x00ff00ffu), odd);
}
#endif

template <int Bits, int T, int V>
void packed_int8_tile(const PackedInt8Params& q, const int8_t* x, int64_t m0, int64_t n0) {
  constexpr int kPerWord = 32 / Bits;
  const PackedParams& p = q.packed;
  const int64_t tokens = least(T, p.m - m0);
  const uint32_t* words[V];
  int64_t channel[V];
  for (int v = 0; v < V; ++v) {
    channel[v] = least(n0 + v * kLanes, p.n_pad - kLanes);
    words[v] = p.qweight + channel[v] / 16 * p.words * 16 + channel[v] % 16;
  }
  const int64_t group_words = p.group_size / kPerWord;
  vf total[T][V] = {};
  for (int64_t g = 0, word = 0, run = 0; g < p.groups; ++g) {
    const int64_t group_end = least(word + group_words, p.words);
    for (; word < group_end; ++run) {
      const int64_t run_end = least(word + kRunInt8 / kPerWord, group_end);
      vi acc[T][V] = {};
      for (; word < run_end; ++word, x += kPerWord * T) {
        vu w[V];
        for (int v = 0; v < V; ++v) {
          w[v] = load_raw<vu>(words[v] + word * 16);
          if (T <= 4) __builtin_prefetch(words[v] + (word + kAhead) * 16);
        }
#pragma GCC unroll 2
        for (int half = 0; half < kPerWord / 4; ++half) {
          vu codes[V];
          for (int v = 0; v < V; ++v)
            codes[v] = Bits == 8 ? w[v] : w[v] >> (4 * half) & 0x0f0f0f0fu;
          for (int t = 0; t < T; ++t) {
            int32_t four;
            __builtin_memcpy(&four, x + t * kPerWord + half * 4, 4);
            const vi xs = four - vi{};
            for (int v = 0; v < V; ++v) acc[t][v] = dot4(acc[t][v], codes[v], xs);
          }
        }
      }
      for (int v = 0; v < V; ++v) {
        const int64_t at = g * p.n_pad + channel[v];
        const vf scale = load_raw<vf>(p.scales + at);
        const vu zero =
            p.zeros ? widen(load_raw<vb>(p.zeros + at)) : vu{} + (Bits == 4 ? 8u : 128u);
        for (int t = 0; t < T; ++t) {
          const int64_t i = least(m0 + t, p.m - 1) * q.runs + run;
          const vu d = (vu)acc[t][v] - zero * static_cast<uint32_t>(q.x_sum[i]);
          const vf y = rounded(__builtin_convertvector((vi)d, vf) * q.x_scale[i]);
          total[t][v] += rounded(y * scale);
          if (p.float_zeros) {
            const float sum = q.x_scale[i] * static_cast<float>(q.x_sum[i]);
            total[t][v] += rounded(load_raw<vf>(p.float_zeros + at) * sum);
          }
        }
      }
    }
  }
  for (int t = 0; t < tokens; ++t)
    for (int v = 0; v < V; ++v) {
      const int64_t n = n0 + v * kLanes;
      if (n < p.n) store_lanes(p.out, m0 + t, n, least(kLanes, p.n - n), total[t][v]);
    }
}

template <int Bits, int T, int V>
void packed_int8_block(const PackedInt8Params& q, const int8_t* x, int64_t m0, int64_t n0) {
  const int64_t n_end = least(n0 + kPackedBlock, q.packed.n);
  for (int64_t n = n0; n < n_end; n += V * kLanes) packed_int8_tile<Bits, T, V>(q, x, m0, n);
}

template <int Bits>
void packed_int8_range(const PackedInt8Params& q, int64_t begin, int64_t end) {
  constexpr bool wide = kLanes >= 16;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t n0 = b * kPackedBlock;
    const int8_t* x = q.staged;
    for (int64_t m = 0; m < q.packed.m;) {
      const int64_t tile = tile_tokens(q.packed.m - m);
      if (tile == 8)
        packed_int8_block<Bits, 8, wide ? 2 : 1>(q, x, m, n0);
      else if (tile == 4)
        packed_int8_block<Bits, 4, wide ? 4 : 2>(q, x, m, n0);
      else if (tile == 2)
        packed_int8_block<Bits, 2, wide ? 4 : 2>(q, x, m, n0);
      else
        packed_int8_block<Bits, 1, 4>(q, x, m, n0);
      x += tile * q.packed.k_pad;
      m += tile;
    }
  }
}

#ifndef __AVX512VNNI__  // that level uses the AVX-512 object
template <class E>
FI_INLINE void stage_token(const StageInt8Params& p, int64_t m, int64_t tile, int8_t* dst) {
  const char* row = static_cast<const char*>(p.x) + m * p.x_stride * E::size;
  float* gathered = p.perm ? p.gathered + m * p.k : nullptr;
  if (p.perm)
    for (int64_t i = 0; i < p.k; ++i) gathered[i] = E::get(row, p.perm[i]);
  int8_t* codes = p.codes + m * p.k_pad;
  for (int64_t g = 0, run = m * p.runs; g < p.groups; ++g) {
    const int64_t group_end = least((g + 1) * p.group_size, p.k);
    for (int64_t k = g * p.group_size; k < group_end; k += kRunInt8, ++run) {
      const int64_t n = least(kRunInt8, group_end - k);
      if (p.perm)
        quantize_row(gathered + k, n, codes + k, p.x_scale + run, nullptr);
      else
        quantize_row_as<E>(row + k * E::size, n, codes + k, p.x_scale + run, nullptr);
      int32_t sum = 0;
      for (int64_t i = k; i < k + n; ++i) sum += codes[i];
      p.x_sum[run] = sum;
    }
  }
  for (int64_t i = p.k; i < p.k_pad; ++i) codes[i] = 0;
  if (p.bits == 8) {
    for (int64_t i = 0; i < p.k_pad; i += 4) __builtin_memcpy(dst + i * tile, codes + i, 4);
  } else {
    for (int64_t i = 0; i < p.k_pad; i += 8)
      for (int64_t j = 0; j < 4; ++j) {
        dst[i * tile + j] = codes[i + 2 * j];
        dst[i * tile + 4 + j] = codes[i + 2 * j + 1];
      }
  }
}
#endif

}  // namespace

void linear_packed_int8(const PackedInt8Params& q, int64_t begin, int64_t end) {
  if (q.packed.bits == 4)
    packed_int8_range<4>(q, begin, end);
  else
    packed_int8_range<8>(q, begin, end);
}

#ifndef __AVX512VNNI__
// Work items are token tiles of kTokenTile tokens. The tokens that fill up a short tile are copies
// of the last one; nothing is stored for them.
void linear_stage_int8(const StageInt8Params& p, int64_t begin, int64_t end) {
  with_float(p.dtype, [&](auto e) {
    using E = decltype(e);
    for (int64_t m = begin * kTokenTile; m < least(end * kTokenTile, p.m);) {
      const int64_t tile = tile_tokens(p.m - m), per_word = 32 / p.bits;
      for (int64_t t = 0; t < tile; ++t)
        stage_token<E>(p, least(m + t, p.m - 1), tile, p.staged + m * p.k_pad + t * per_word);
      m += tile;
    }
  });
}
#endif

}  // namespace fastinfer::cpu::FI_ISA
