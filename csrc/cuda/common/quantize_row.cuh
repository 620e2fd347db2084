// int8 quantisation of a row on the device: the rule and the bits of csrc/cpu/quantize_row.h.
//
//   symmetric    s = absmax / 127,           q = clamp(rne(y / s), -127, 127)
//   asymmetric   s = max / 255 - min / 255,  z = clamp(rne(-128 - min / s)),
//                with min <= 0 <= max,       q = clamp(rne(y / s) + z, -128, 127)
//   s == 0: s = 1, z = 0, q = 0. inf or NaN in the row: s = NaN, z = 0, q = 0.
//
// Ranges propagate NaN; reduced over threads as bits, which order as the magnitudes do, inf and NaN
// on top.
#pragma once

#include "row_group.cuh"

namespace fastinfer::cuda {

__device__ __forceinline__ float max_or_nan(float a, float b) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
  return a;
}
__device__ __forceinline__ float min_or_nan(float a, float b) {
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
  return a;
}

// Largest and smallest value of a row and 0. Symmetric codes need the larger magnitude only, which
// is then `top`.
struct RowRange {
  float top = 0.0f, bottom = 0.0f;

  // Zeros past the end of a row change nothing.
  template <int kSize>
  __device__ __forceinline__ void add(const float (&y)[kSize], bool symmetric) {
    if (symmetric) {  // short chains
      float most[kSize / 2];
#pragma unroll
      for (int j = 0; j < kSize / 2; ++j)
        most[j] = max_or_nan(fabsf(y[2 * j]), fabsf(y[2 * j + 1]));
#pragma unroll
      for (int j = 0; j < kSize / 4; ++j) most[j] = max_or_nan(most[j], most[j + kSize / 4]);
      if (kSize == 8) most[0] = max_or_nan(most[0], most[1]);
      top = max_or_nan(top, most[0]);
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j) top = max_or_nan(top, y[j]);
#pragma unroll
      for (int j = 0; j < kSize; ++j) bottom = min_or_nan(bottom, y[j]);
    }
  }
};

// Bits of the magnitudes of a range.
__device__ __forceinline__ uint2 range_bits(const RowRange& range) {
  return make_uint2(__float_as_uint(range.top) & 0x7FFFFFFFu,
                    __float_as_uint(range.bottom) & 0x7FFFFFFFu);
}
__device__ __forceinline__ RowRange range_of_bits(uint2 bits) {
  return {__uint_as_float(bits.x), -__uint_as_float(bits.y)};
}

// Largest bits over `lanes` neighbours (a power of two); every lane of the warp calls.
__device__ __forceinline__ uint2 max_over_lanes(uint2 bits, int lanes, bool symmetric) {
  if (lanes == 32) {
    bits.x = __reduce_max_sync(kAllLanes, bits.x);
    if (!symmetric) bits.y = __reduce_max_sync(kAllLanes, bits.y);
    return bits;
  }
#pragma unroll 1
  for (int lane = lanes / 2; lane > 0; lane >>= 1) {
    bits.x = max(bits.x, __shfl_xor_sync(kAllLanes, bits.x, lane));
    bits.y = max(bits.y, __shfl_xor_sync(kAllLanes, bits.y, lane));
  }
  return bits;
}

// Over the row; every thread of the block calls. Once per kernel.
__device__ __forceinline__ RowRange reduce_range(const RowGroup& group, const RowRange& range,
                                                 bool symmetric, uint2 (&scratch)[32]) {
  uint2 bits = max_over_lanes(range_bits(range), min(group.threads, 32), symmetric);
  if (group.warps > 1) {
    const int lane = threadIdx.x % 32;
    if (lane == 0) scratch[threadIdx.x / 32] = bits;
    __syncthreads();
    bits = max_over_lanes(scratch[group.row * group.warps + min(lane, group.warps - 1)], 32,
                          symmetric);
  }
  return range_of_bits(bits);
}

// x / kDivisor as IEEE rounds it, for the divisors used here: x times the rounded reciprocal is
// next to the quotient, the remainder is exact, the sum rounds to the right one (every mantissa was
// tried). Far from the middle of the range: the division of the library.
template <int kDivisor>
__device__ __forceinline__ float quotient_by(float x) {
  static_assert(kDivisor == 127 || kDivisor == 255, "divisors that were tried");
  constexpr float d = kDivisor, r = 1.0f / kDivisor;
  if (!(fabsf(x) >= 0x1p-80f && fabsf(x) <= 0x1p120f)) return __fdiv_rn(x, d);
  const float q = __fmul_rn(x, r);
  return __fmaf_rn(__fmaf_rn(-q, d, x), r, q);
}

enum class CodeMode {
  plain,  // dynamic symmetric: |y / s| <= 127 holds without a clamp
  near,   // the same by one multiplication: y times the rounded 1 / s, rounded once
  full,   // anything else: clamp; a NaN element gives z
};

template <CodeMode kMode>
struct ModeTag {
  static constexpr CodeMode mode = kMode;
};

struct RowCodes {
  float scale, inverse, rest, low, high;
  float divisor, factor;  // of y: scale and 1, or both times a power of two
  int zero;
  CodeMode mode;

  // Quotients, as IEEE rounds them. With 1 / s = inverse + rest, y * inverse + y * rest is one of
  // the two neighbours of y / s, and adding remainder * inverse rounds to the right one (Markstein
  // 1990). The remainder is exact where s is in the middle of the range, to where a power of two
  // brings it and y, and the quotient matters, i.e. is not far below 1/2; one beyond 1024 is
  // clamped in any case.
  __device__ __forceinline__ void prepare(float s, CodeMode usual) {
    scale = s, factor = 1.0f, mode = usual;
    if (!(fabsf(s) >= 0x1p-60f && fabsf(s) <= 0x1p60f)) {
      factor = fabsf(s) < 1.0f ? 0x1p64f : 0x1p-64f;
      mode = CodeMode::full;
    }
    divisor = s * factor;
    inverse = __frcp_rn(divisor);
    rest = __fmul_rn(__fmaf_rn(-divisor, inverse, 1.0f), inverse);
  }
  __device__ __forceinline__ float quotient(float y) const {
    const float q = __fmaf_rn(y, inverse, __fmul_rn(y, rest));
    return __fmaf_rn(__fmaf_rn(-q, divisor, y), inverse, q);
  }

  template <CodeMode kMode>
  __device__ __forceinline__ uint32_t code(float y) const {
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the integer
    if (kMode == CodeMode::near) return __float_as_uint(__fmaf_rn(y, inverse, kMagic));
    if (kMode == CodeMode::plain) return __float_as_uint(__fadd_rn(quotient(y), kMagic));
    y *= factor;
    float t = fabsf(y) < 1024.0f * fabsf(divisor) ? quotient(y) : y * inverse;  // NaN: y * inverse
    t = t == t ? t : 0.0f;
    return __float_as_uint(__fadd_rn(fminf(fmaxf(t, low), high), kMagic)) + zero;
  }

  // n codes at q + i; whole packs when `packs`.
  template <CodeMode kMode, int kSize>
  __device__ __forceinline__ void store(int8_t* q, int i, int n, bool packs,
                                        const float (&y)[kSize]) const {
    static_assert(kSize == 4 || kSize == 8, "a pack of fp32 or of 16-bit elements");
    uint32_t word[kSize / 4];
#pragma unroll
    for (int w = 0; w < kSize / 4; ++w) {
      const uint32_t ab = __byte_perm(code<kMode>(y[4 * w]), code<kMode>(y[4 * w + 1]), 0x0040);
      const uint32_t cd = __byte_perm(code<kMode>(y[4 * w + 2]), code<kMode>(y[4 * w + 3]), 0x0040);
      word[w] = __byte_perm(ab, cd, 0x5410);
    }
    if (packs) {
      if constexpr (kSize == 8) {
        *reinterpret_cast<uint2*>(q + i) = make_uint2(word[0], word[1]);
      } else {
        *reinterpret_cast<uint32_t*>(q + i) = word[0];
      }
    } else {
      uint64_t codes =
          kSize == 8 ? static_cast<uint64_t>(word[kSize / 4 - 1]) << 32 | word[0] : word[0];
      const int count = min(n - i, kSize);
#pragma unroll 1
      for (int j = 0; j < count; ++j, codes >>= 8) q[i + j] = static_cast<int8_t>(codes);
    }
  }
};

__device__ __forceinline__ RowCodes row_codes(const RowRange& range, bool asymmetric) {
  const float top = range.top, bottom = range.bottom;
  const float s = asymmetric ? __fsub_rn(quotient_by<255>(top), quotient_by<255>(bottom))
                             : quotient_by<127>(top);
  RowCodes codes;
  codes.zero = 0, codes.low = codes.high = 0.0f;  // a row without codes is one that is clamped to 0
  if (s == 0.0f || !(top < INFINITY && bottom > -INFINITY)) {
    codes.prepare(s == 0.0f ? 1.0f : __uint_as_float(0x7FC00000u), CodeMode::full);
    return codes;
  }
  codes.prepare(s, asymmetric ? CodeMode::full : CodeMode::plain);
  float z = 0.0f;
  if (asymmetric) z = fminf(fmaxf(rintf(-128.0f - __fdiv_rn(bottom, s)), -128.0f), 127.0f);
  codes.zero = static_cast<int>(z);
  codes.low = (asymmetric ? -128.0f : -127.0f) - z;
  codes.high = 127.0f - z;
  return codes;
}

__device__ __forceinline__ RowCodes static_codes(float s) {
  RowCodes codes;
  codes.zero = 0, codes.low = -127.0f, codes.high = 127.0f;
  codes.prepare(s, CodeMode::full);
  return codes;
}

// Symmetric codes of eight values of a row whose largest magnitude has the bits `top`, in as few
// instructions as there are: at a single row a kernel's time is that of fetching its code. Only for
// a `top` in the middle of the range (fits); rare_codes() is for any other. The same bits as
// RowCodes: there the library's reciprocal is this one with a check around it.
struct QuickCodes {
  float scale, inverse, rest;

  __device__ __forceinline__ static bool fits(uint32_t top) {
    constexpr uint32_t kLeast = 0x28000000u, kMost = 0x58000000u;  // 2^-47, 2^49
    return top - kLeast < kMost - kLeast;
  }
  __device__ __forceinline__ explicit QuickCodes(uint32_t top) {
    constexpr float d = 127.0f, r = 1.0f / d;
    const float x = __uint_as_float(top), q = __fmul_rn(x, r);
    scale = __fmaf_rn(__fmaf_rn(-q, d, x), r, q);
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(scale));
    inverse = __fmaf_rn(inverse, __fmaf_rn(-scale, inverse, 1.0f), inverse);
    rest = __fmul_rn(__fmaf_rn(-scale, inverse, 1.0f), inverse);
  }
  // kNear: as CodeMode::near.
  template <bool kNear = false>
  __device__ __forceinline__ uint2 words(const float (&y)[8]) const {
    uint32_t code[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (kNear) {
        code[j] = __float_as_uint(__fmaf_rn(y[j], inverse, 12582912.0f));
        continue;
      }
      const float q = __fmaf_rn(y[j], inverse, __fmul_rn(y[j], rest));
      const float exact = __fmaf_rn(__fmaf_rn(-q, scale, y[j]), inverse, q);
      code[j] = __float_as_uint(__fadd_rn(exact, 12582912.0f));
    }
    uint32_t word[2];
#pragma unroll
    for (int w = 0; w < 2; ++w)
      word[w] = __byte_perm(__byte_perm(code[4 * w], code[4 * w + 1], 0x0040),
                            __byte_perm(code[4 * w + 2], code[4 * w + 3], 0x0040), 0x5410);
    return make_uint2(word[0], word[1]);
  }
};

struct RareCodes {
  uint2 words;
  float scale;
};
// `factor` of a scale that has codes. Not inlined, as it would lie in the middle of the usual path;
// values in registers, as an array would be stored on that path.
static __device__ __noinline__ RareCodes rare_codes(uint32_t top, float factor, float y0, float y1,
                                                    float y2, float y3, float y4, float y5,
                                                    float y6, float y7) {
  const float values[8] = {y0, y1, y2, y3, y4, y5, y6, y7};
  const RowCodes codes = row_codes({__uint_as_float(top), 0.0f}, false);
  const bool none = codes.low == codes.high;
  RareCodes out{{0, 0}, none ? codes.scale : codes.scale * factor};
#pragma unroll 1
  for (int j = 0; j < 8; ++j) {
    const uint32_t code = codes.code<CodeMode::full>(values[j]) & 0xFFu;
    if (j < 4) {
      out.words.x |= code << 8 * j;
    } else {
      out.words.y |= code << 8 * (j - 4);
    }
  }
  return out;
}
__device__ __forceinline__ RareCodes rare_codes(uint32_t top, float factor, const float (&y)[8]) {
  return rare_codes(top, factor, y[0], y[1], y[2], y[3], y[4], y[5], y[6], y[7]);
}

// Of eight magnitudes, NaN on top.
__device__ __forceinline__ uint32_t top_of_eight(const float (&y)[8]) {
  float most[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) most[j] = max_or_nan(fabsf(y[j]), fabsf(y[j + 4]));
  return __float_as_uint(max_or_nan(max_or_nan(most[0], most[1]), max_or_nan(most[2], most[3]))) &
         0x7FFFFFFFu;
}

// f(ModeTag): the loops over a row are compiled once per mode, each free of the other's work.
template <class F>
__device__ __forceinline__ void with_mode(CodeMode mode, F&& f) {
  if (mode == CodeMode::plain) return f(ModeTag<CodeMode::plain>{});
  return f(ModeTag<CodeMode::full>{});
}

}  // namespace fastinfer::cuda
