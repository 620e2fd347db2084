// int4_linear, int8_linear: Y = X dequant(W)^T + bias straight from the packed words, exact codes.
//
//   per run of at most kRun k inside a group:  a = sum_k x[k] * (q - z),  y += a * s      in fp32
//   per group, with float zeros:               y += zf * sum_k x[k]
//
// Lanes are output channels: one 64-byte row of words is 16 channels x 8 (4-bit) or 4 (8-bit) k, so
// nothing is reduced across lanes. q - z is exact: either a 16-entry lookup (vpermps, AVX-512, 4
// bit without zeros) or the float 2^23 + q, made by or-ing q into the mantissa, minus 2^23 + z. A
// tile is T tokens x V vectors of channels; a dequantised vector serves all T tokens. x is staged
// as fp32 [k_pad][T] per tile (linear_stage), so the kernel broadcasts from one running pointer.
// Every output has one accumulator whatever the tile: bits depend on neither M nor the threads.
#ifndef __AVX512VNNI__  // that level uses the AVX-512 object
#include "linear_epilogue.h"

namespace fastinfer::cpu::FI_ISA {
namespace {

constexpr uint32_t kMagic = 0x4b000000u;  // 2^23 as fp32: the low mantissa bits count ones
constexpr float kMagicFloat = 8388608.0f;
constexpr int64_t kRun = 256;  // longer sums in one fp32 accumulator cost accuracy

template <int Bits, bool Lookup, int T, int V>
void packed_tile(const PackedParams& p, const float* x, int64_t m0, int64_t n0) {
  constexpr int kPerWord = 32 / Bits;
  constexpr float kMiddle = Bits == 4 ? 8.0f : 128.0f;
  const int64_t tokens = least(T, p.m - m0);
  const uint32_t* words[V];
  int64_t channel[V];
  for (int v = 0; v < V; ++v) {
    channel[v] = least(n0 + v * kLanes, p.n_pad - kLanes);
    words[v] = p.qweight + channel[v] / 16 * p.words * 16 + channel[v] % 16;
  }
#if defined(__AVX512F__)
  const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
#endif
  const int64_t group_words = p.group_size / kPerWord;
  vf total[T][V] = {};
  for (int64_t g = 0, word = 0; g < p.groups; ++g) {
    const int64_t group_end = least(word + group_words, p.words);
    vf zero[V];
    for (int v = 0; v < V; ++v)
      zero[v] =
          kMagicFloat +
          (p.zeros
               ? __builtin_convertvector(
                     __builtin_convertvector(load_raw<vb>(p.zeros + g * p.n_pad + channel[v]), vi),
                     vf)
               : splat(kMiddle));
    while (word < group_end) {
      const int64_t run_end = least(word + kRun / kPerWord, group_end);
      vf acc[T][V] = {};
      for (; word < run_end; ++word, x += kPerWord * T) {
        vu w[V];
        for (int v = 0; v < V; ++v) {
          w[v] = load_raw<vu>(words[v] + word * 16);
          if (T <= 4) __builtin_prefetch(words[v] + (word + kAhead) * 16);
        }
#pragma GCC unroll 8
        for (int j = 0; j < kPerWord; ++j)
          for (int v = 0; v < V; ++v) {
            const vu bits = w[v] >> (j * Bits);
            vf code;
#if defined(__AVX512F__)
            if (Lookup)  // vpermps looks at the low four bits of an index only
              code = (vf)_mm512_permutexvar_ps((__m512i)bits, table);
            else
#endif
              code = (vf)((bits & ((1u << Bits) - 1)) | kMagic) - zero[v];
            for (int t = 0; t < T; ++t) acc[t][v] += code * x[j * T + t];
          }
      }
      for (int v = 0; v < V; ++v) {
        const vf scale = load_raw<vf>(p.scales + g * p.n_pad + channel[v]);
        for (int t = 0; t < T; ++t) total[t][v] += acc[t][v] * scale;
      }
    }
    if (p.float_zeros)
      for (int v = 0; v < V; ++v) {
        const vf zf = load_raw<vf>(p.float_zeros + g * p.n_pad + channel[v]);
        for (int t = 0; t < T; ++t)
          total[t][v] += zf * p.group_sums[least(m0 + t, p.m - 1) * p.groups + g];
      }
  }
  for (int t = 0; t < tokens; ++t)
    for (int v = 0; v < V; ++v) {
      const int64_t n = n0 + v * kLanes;
      if (n < p.n) store_lanes(p.out, m0 + t, n, least(kLanes, p.n - n), total[t][v]);
    }
}

template <int Bits, bool Lookup, int T, int V>
void packed_block(const PackedParams& p, const float* x, int64_t m0, int64_t n0, int64_t n_end) {
  for (int64_t n = n0; n < n_end; n += V * kLanes) packed_tile<Bits, Lookup, T, V>(p, x, m0, n);
}

template <int Bits, bool Lookup>
void packed_range(const PackedParams& p, int64_t begin, int64_t end) {
  constexpr bool wide = kLanes >= 16;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t n0 = b * kPackedBlock, n_end = least(n0 + kPackedBlock, p.n);
    const float* x = p.staged;
    for (int64_t m = 0; m < p.m;) {
      const int64_t tile = tile_tokens(p.m - m);
      if (tile == 8)
        packed_block<Bits, Lookup, 8, wide ? 2 : 1>(p, x, m, n0, n_end);
      else if (tile == 4)
        packed_block<Bits, Lookup, 4, wide ? 4 : 2>(p, x, m, n0, n_end);
      else if (tile == 2)
        packed_block<Bits, Lookup, 2, wide ? 4 : 2>(p, x, m, n0, n_end);
      else
        packed_block<Bits, Lookup, 1, 4>(p, x, m, n0, n_end);
      x += tile * p.k_pad;
      m += tile;
    }
  }
}

}  // namespace

void linear_packed(const PackedParams& p, int64_t begin, int64_t end) {
#if defined(__AVX512F__)
  if (p.bits == 4 && !p.zeros) return packed_range<4, true>(p, begin, end);
#endif
  if (p.bits == 4)
    packed_range<4, false>(p, begin, end);
  else
    packed_range<8, false>(p, begin, end);
}

// Work items are token tiles of kTokenTile tokens (the last one may be shorter).
void linear_stage(const StageParams& p, int64_t begin, int64_t end) {
  with_float(p.dtype, [&](auto e) {
    using E = decltype(e);
    for (int64_t m = begin * kTokenTile; m < least(end * kTokenTile, p.m);) {
      const int64_t tile = tile_tokens(p.m - m), tokens = least(tile, p.m - m);
      float* dst = p.staged + m * p.k_pad;
      for (int64_t t = 0; t < tile; ++t) {
        const char* row = static_cast<const char*>(p.x) + (m + t) * p.x_stride * E::size;
        const bool real = t < tokens;
        int64_t i = 0;
        if (real && !p.perm && tile == 1)
          for (; i + kLanes <= p.k; i += kLanes) store_raw(dst + i, E::load(row, i));
        for (; i < p.k; ++i) dst[i * tile + t] = real ? E::get(row, p.perm ? p.perm[i] : i) : 0.0f;
        for (; i < p.k_pad; ++i) dst[i * tile + t] = 0.0f;
        if (real && p.group_sums)
          for (int64_t g = 0; g < p.groups; ++g) {
            double total = 0.0;
            for (int64_t k = g * p.group_size; k < least((g + 1) * p.group_size, p.k); ++k)
              total += dst[k * tile + t];
            p.group_sums[(m + t) * p.groups + g] = static_cast<float>(total);
          }
      }
      m += tile;
    }
  });
}

}  // namespace fastinfer::cpu::FI_ISA
#endif
