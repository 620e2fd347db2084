// int8 quantisation of a row on the device: the rule and the bits of csrc/cpu/quantize_row.h.
//
//   symmetric    s = absmax / 127,           q = clamp(rne(y / s), -127, 127)
//   asymmetric   s = max / 255 - min / 255,  z = clamp(rne(-128 - min / s)),
//                with min <= 0 <= max,       q = clamp(rne(y / s) + z, -128, 127)
//   s == 0: s = 1, z = 0, q = 0. inf or NaN in the row: s = NaN, z = 0, q = 0.
//
// Minimum and maximum are taken on the bits of the floats: as signed integers positive floats order
// as their values and beat every negative one, as unsigned ones negative floats order as their
// magnitudes and beat every positive one; inf and NaN come out on top of either.
#pragma once

#include "row_group.cuh"

namespace fastinfer::cuda {

struct RowRange {
  int32_t top = 0;                // bits of the largest positive value
  uint32_t bottom = 0x80000000u;  // bits of the smallest negative value

  __device__ __forceinline__ void add(float y) {
    top = max(top, __float_as_int(y));
    bottom = max(bottom, __float_as_uint(y));
  }
  // Zeros past the end of a row change nothing.
  template <int kSize>
  __device__ __forceinline__ void add(const float (&y)[kSize]) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) add(y[j]);
  }
};

// Over the row; every thread of the block calls. Symmetric codes need the larger magnitude only,
// which is returned as `top`.
__device__ __forceinline__ RowRange reduce_range(RowGroup& group, RowRange range, bool symmetric,
                                                 RowScratch<uint2>& scratch) {
  uint32_t bottom = range.bottom & 0x7FFFFFFFu, top = static_cast<uint32_t>(range.top);
  if (symmetric) top = max(top, bottom), bottom = 0;
  const auto over_lanes = [&](int lanes) {
    if (lanes == 32) {
      top = __reduce_max_sync(kAllLanes, top);
      if (!symmetric) bottom = __reduce_max_sync(kAllLanes, bottom);
      return;
    }
    for (int lane = lanes / 2; lane > 0; lane >>= 1) {
      top = max(top, __shfl_xor_sync(kAllLanes, top, lane));
      bottom = max(bottom, __shfl_xor_sync(kAllLanes, bottom, lane));
    }
  };
  over_lanes(min(group.threads, 32));
  if (group.warps > 1) {
    uint2* values = scratch.value[group.turn];
    group.turn ^= 1;
    const int lane = threadIdx.x % 32;
    if (lane == 0) values[threadIdx.x / 32] = make_uint2(top, bottom);
    __syncthreads();
    const uint2 mine = values[group.row * group.warps + min(lane, group.warps - 1)];
    top = mine.x, bottom = mine.y;
    over_lanes(32);
  }
  RowRange all;
  all.top = static_cast<int32_t>(top);
  all.bottom = bottom | 0x80000000u;
  return all;
}

enum class CodeMode {
  plain,  // dynamic symmetric: |y / s| <= 127 holds without a clamp
  full,   // zero point or static scale: clamp; a NaN element gives z
  slow,   // the same for a scale at the ends of the range: the division of the hardware library
  zeros,  // a row without codes
};

template <CodeMode kMode>
struct ModeTag {
  static constexpr CodeMode mode = kMode;
};

struct RowCodes {
  float scale, inverse, rest, low, high;
  int zero;
  CodeMode mode;
  bool quick;

  // Quotients, as IEEE rounds them. With 1 / s = inverse + rest, y * inverse + y * rest is one of
  // the two neighbours of y / s, and adding remainder * inverse rounds to the right one (Markstein
  // 1990). The remainder is exact where s is in the middle of the range and the quotient matters,
  // i.e. is not far below 1/2; one beyond 1024 is clamped in any case.
  __device__ __forceinline__ void prepare(float s) {
    scale = s;
    quick = s >= 0x1p-60f && s <= 0x1p60f;
    inverse = quick ? __frcp_rn(s) : 0.0f;
    rest = __fmul_rn(__fmaf_rn(-s, inverse, 1.0f), inverse);
  }
  __device__ __forceinline__ float quotient(float y) const {
    const float q = __fmaf_rn(y, inverse, __fmul_rn(y, rest));
    return __fmaf_rn(__fmaf_rn(-q, scale, y), inverse, q);
  }

  template <CodeMode kMode>
  __device__ __forceinline__ uint32_t code(float y) const {
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the integer
    if (kMode == CodeMode::zeros) return 0;
    float t;
    if (kMode == CodeMode::plain) {
      t = quotient(y);
    } else {
      if (kMode == CodeMode::slow) {
        t = __fdiv_rn(y, scale);
      } else {
        t = quotient(y);
        t = fabsf(y) < 1024.0f * scale ? t : y * inverse;  // NaN: y * inverse
      }
      t = t == t ? t : 0.0f;
      t = fminf(fmaxf(t, low), high);
    }
    const uint32_t bits = __float_as_uint(__fadd_rn(t, kMagic));
    return kMode == CodeMode::plain ? bits : bits + zero;
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

__device__ __forceinline__ RowCodes row_codes(RowRange range, bool asymmetric) {
  const float top = __int_as_float(range.top);
  const float bottom = -__uint_as_float(range.bottom & 0x7FFFFFFFu);
  const bool bad = range.top >= 0x7F800000 || range.bottom >= 0xFF800000u;
  float s = asymmetric ? __fsub_rn(__fdiv_rn(top, 255.0f), __fdiv_rn(bottom, 255.0f))
                       : __fdiv_rn(fmaxf(top, -bottom), 127.0f);
  RowCodes codes;
  codes.zero = 0;
  if (bad || s == 0.0f) {
    codes.prepare(bad ? __uint_as_float(0x7FC00000u) : 1.0f);
    codes.low = codes.high = 0.0f;
    codes.mode = CodeMode::zeros;
    return codes;
  }
  codes.prepare(s);
  float z = 0.0f;
  if (asymmetric) z = fminf(fmaxf(rintf(-128.0f - __fdiv_rn(bottom, s)), -128.0f), 127.0f);
  codes.zero = static_cast<int>(z);
  codes.low = (asymmetric ? -128.0f : -127.0f) - z;
  codes.high = 127.0f - z;
  codes.mode = !codes.quick ? CodeMode::slow : asymmetric ? CodeMode::full : CodeMode::plain;
  return codes;
}

__device__ __forceinline__ RowCodes static_codes(float s) {
  RowCodes codes;
  codes.prepare(s);
  codes.zero = 0, codes.low = -127.0f, codes.high = 127.0f;
  codes.mode = codes.quick ? CodeMode::full : CodeMode::slow;
  return codes;
}

// f(ModeTag): the loops over a row are compiled once per mode, each free of the others' work.
template <class F>
__device__ __forceinline__ void with_mode(CodeMode mode, F&& f) {
  switch (mode) {
    case CodeMode::plain:
      return f(ModeTag<CodeMode::plain>{});
    case CodeMode::full:
      return f(ModeTag<CodeMode::full>{});
    case CodeMode::slow:
      return f(ModeTag<CodeMode::slow>{});
    case CodeMode::zeros:
      return f(ModeTag<CodeMode::zeros>{});
  }
}

}  // namespace fastinfer::cuda
