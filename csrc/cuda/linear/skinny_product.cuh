// The arithmetic of one warp of the skinny kernel: codes of a slot to fragments, products with x,
// scales. Scales of whole blocks are applied to sums over a block or two; the generic kind takes
// groups of any multiple of 8 columns and zero points through the sum of x.
#pragma once

#include "../ptx/mma.cuh"
#include "skinny_load.cuh"

namespace fastinfer::cuda {

template <bool kBf16, int kBits, int kTiles, int kStrips, bool kGeneric>
struct SkinnyProduct {
  static constexpr int kPieces = kSkinnyPieces<kBits, kStrips>;

  const SkinnyParams& p;
  int g8, strip0;  // strip0: of the warp's first strip among the four of its 64 rows
  bool wide_scale, sums, float_zeros, swap;
  int meta_at, half_at[2];
  Int4Zero<kBf16> zero[kStrips];
  float total[kStrips][kTiles][4], acc[kStrips][kTiles][4], sum[kTiles][4];
  uint2 scale[kStrips];
  uint32_t w[kPieces][4];

  __device__ __forceinline__ SkinnyProduct(const SkinnyParams& params, int lane)
      : p(params), g8(lane / 4), strip0(0) {
    wide_scale = p.scale_dtype == DType::f32;
    sums = kGeneric && p.zeros != nullptr;
    float_zeros = p.zero_dtype != DType::u8;
    if constexpr (kBits == 4) {
#pragma unroll
      for (int s = 0; s < kStrips; ++s) zero[s].set(0, 8), zero[s].set(1, 8);
    }
    meta_at = kPieces * 512 + g8 * 16 - lane * 16;
    keep(meta_at);
    // 8 bit: a lane owns 32 bytes; neighbours in fours read their halves in opposite order, for the
    // banks.
    swap = lane / 4 % 2;
    half_at[0] = lane * 16 + (swap ? 16 : 0), half_at[1] = lane * 16 + (swap ? 0 : 16);
    keep(half_at[0]), keep(half_at[1]);
  }

  __device__ __forceinline__ void start_tile(int strip) {
    strip0 = strip % 4;
    clear(total);
  }
  __device__ __forceinline__ void start_pair() {
    clear(acc);
    clear_sums();
  }

  // The words of the slot at `slot` (this lane's address).
  __device__ __forceinline__ void load_words(uint32_t slot) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const uint32_t piece = kBits == 8 ? slot + i / 2 * 1024 + half_at[i % 2] : slot + i * 512;
      const uint4 v = load_shared(piece);
      w[i][0] = v.x, w[i][1] = v.y, w[i][2] = v.z, w[i][3] = v.w;
    }
    if constexpr (kBits == 8) {
#pragma unroll
      for (int i = 0; i < kPieces; i += 2)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t low = swap ? w[i + 1][j] : w[i][j];
          w[i + 1][j] = swap ? w[i][j] : w[i + 1][j];
          w[i][j] = low;
        }
    }
  }
  // Scales of a whole block, and its int4 zero points.
  __device__ __forceinline__ void load_scales(uint32_t slot) {
    const uint32_t meta = slot + meta_at;
#pragma unroll
    for (int s = 0; s < kStrips; ++s)
      scale[s] = load_two(at_strip(meta, s, wide_scale), wide_scale);
    if (kBits == 4 && p.zeros) {
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        const uint32_t z = byte_zeros(meta, s);
        zero[s].set(0, z & 0xFF);
        zero[s].set(1, z >> 8);
      }
    }
  }
  // One block, x at x_at: sums since start_pair() or the last apply_scales() (16 bit: totals).
  __device__ __forceinline__ void multiply(const uint32_t (&x_at)[kTiles], int odd) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {  // 32 columns
      uint32_t b[kTiles][4];
      load_x(b, x_at, odd * 128 + h * 64);
#pragma unroll
      for (int j = 0; j < 2; ++j) {  // 16 columns
        uint32_t a[kStrips][4];
        fragments(a, h, j);
#pragma unroll
        for (int s = 0; s < kStrips; ++s)
#pragma unroll
          for (int i = 0; i < kTiles; ++i)
            mma_16816<kBf16>(kBits == 16 ? total[s][i] : acc[s][i], a[s], b[i][2 * j],
                             b[i][2 * j + 1]);
      }
    }
  }
  __device__ __forceinline__ void apply_scales() {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      const float2 f = two_floats(scale[s], p.scale_dtype);
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          total[s][i][e] = fmaf(acc[s][i][e], e < 2 ? f.x : f.y, total[s][i][e]);
          acc[s][i][e] = 0.0f;
        }
    }
  }

  // Generic: one block whose first 8 columns are number `unit` of K.
  __device__ __forceinline__ void multiply_generic(const uint32_t (&x_at)[kTiles], int odd,
                                                   uint32_t slot, int unit) {
    const int g = group_of(unit, p.group_magic);
    const int last_group = max(0, p.groups - 1 - g);  // padding beyond K has none of its own
    // Group of the current 8 columns, counted from the block's first; columns up to its end.
    int group = 0, boundary = (g + 1) * p.group_units - unit;
#pragma unroll
    for (int h = 0; h < 2; ++h) {  // 32 columns
      uint32_t b[kTiles][4];
      load_x(b, x_at, odd * 128 + h * 64);
#pragma unroll
      for (int j = 0; j < 2; ++j) {  // 16 columns
        uint32_t a[kStrips][4];
        fragments(a, h, j);
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // 8 columns
          constexpr uint32_t kOnes = kBf16 ? 0x3F803F80u : 0x3C003C00u;
          const int done = 4 * h + 2 * j + half + 1;
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
#pragma unroll
            for (int s = 0; s < kStrips; ++s)
              mma_1688<kBf16>(acc[s][i], a[s][2 * half], a[s][2 * half + 1], b[i][2 * j + half]);
            if (sums) mma_1688<kBf16>(sum[i], kOnes, kOnes, b[i][2 * j + half]);
          }
          if (done == boundary || done == 8) {
            close_group(slot + meta_at + group * 256);
            if (done == boundary) {
              group = min(group + 1, last_group);
              boundary += p.group_units;
            }
          }
        }
      }
    }
  }

 private:
  __device__ __forceinline__ void clear(float (&v)[kStrips][kTiles][4]) {
#pragma unroll
    for (int s = 0; s < kStrips; ++s)
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
#pragma unroll
        for (float& e : v[s][i]) e = 0.0f;
  }
  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (float& e : sum[i]) e = 0.0f;
  }
  // Of a strip: 16-bit values lie in fours of strips, fp32 ones in twos, u8 ones in fours.
  __device__ __forceinline__ uint32_t at_strip(uint32_t meta, int s, bool wide) const {
    return meta + (wide ? ((strip0 + s) & 1) * 8 : ((strip0 + s) & 3) * 4);
  }
  __device__ __forceinline__ uint32_t byte_zeros(uint32_t meta, int s) const {
    return load_shared_2(meta + 128 - g8 * 8 + ((strip0 + s) & 3) * 2);
  }
  __device__ __forceinline__ void load_x(uint32_t (&b)[kTiles][4], const uint32_t (&x_at)[kTiles],
                                         int offset) const {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if constexpr (kBits == 16) {
        const uint4 v = load_shared(x_at[i] + offset);
        b[i][0] = v.x, b[i][1] = v.y, b[i][2] = v.z, b[i][3] = v.w;
      } else {
        ldmatrix_x4(b[i], x_at[i] + offset);
      }
    }
  }
  // The A operand of 16 columns: number 2 h + j of the block.
  __device__ __forceinline__ void fragments(uint32_t (&a)[kStrips][4], int h, int j) const {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      if constexpr (kBits == 4) {
        dequantize_int4<kBf16>(a[s], w[s][2 * h + j], zero[s]);
      } else if constexpr (kBits == 8) {
        dequantize_int8<kBf16>(a[s], w[2 * s + h][2 * j], w[2 * s + h][2 * j + 1]);
      } else {
        a[s][0] = w[4 * s + h][2 * j], a[s][1] = w[4 * s + 2 + h][2 * j];
        a[s][2] = w[4 * s + h][2 * j + 1], a[s][3] = w[4 * s + 2 + h][2 * j + 1];
      }
    }
  }
  // Generic: sums of the group whose scales and zeros are at `values` join the totals.
  __device__ __forceinline__ void close_group(uint32_t values) {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      const float2 f =
          two_floats(load_two(at_strip(values, s, wide_scale), wide_scale), p.scale_dtype);
      const float factor[2] = {f.x, f.y};
      float z[2] = {};
      if (sums && float_zeros) {
        const bool wide = p.zero_dtype == DType::f32;
        const float2 v = two_floats(load_two(at_strip(values + 128, s, wide), wide), p.zero_dtype);
        z[0] = v.x, z[1] = v.y;
      } else if (sums) {
        const int v = byte_zeros(values, s);
        z[0] = static_cast<float>((v & 0xFF) - (1 << (kBits - 1)));
        z[1] = static_cast<float>((v >> 8) - (1 << (kBits - 1)));
      }
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float v = acc[s][i][e], &to = total[s][i][e];
          if (sums && !float_zeros) v = fmaf(-z[e / 2], sum[i][e % 2], v);
          to = fmaf(v, factor[e / 2], to);
          if (sums && float_zeros) to = fmaf(z[e / 2], sum[i][e % 2], to);
          acc[s][i][e] = 0.0f;
        }
    }
    clear_sums();
  }
};

}  // namespace fastinfer::cuda
