// The direct kernel (direct.cuh) for one or two tokens of up to kByteColumns columns, with x in
// bytes: a 4-bit code needs no conversion then.
//
// x of one token and 128 columns becomes fixed point, X = round(x 2^(28 - e)) with 2^e <= max |x| <
// 2^(e + 1): exact for what is not smaller than 2^(e - 21) (fp16: 2^(e - 18)), else off by at most
// 2^(e - 29), which an fp32 sum rounds away. X is four bytes with signs. mma.m16n8k32 multiplies
// bytes: the low nibbles of a packed word are four columns of row g8, and the word as it is, in
// bytes, is 16 times row g8 + 8 plus row g8. So 8 codes cost one AND, and sums are exact integers:
//   low = sum q X, all = low + 16 sum q' X, y += s 2^(e - 28) (sum q X - z sum X), q' likewise.
//
// A byte of a token is a column of B, four to a token. Lane t of four has columns 2t, 2t + 1 of the
// result: bytes 2, 3 of a token for even t, 0, 1 for odd t; 256 times one plus the other fits 32
// bits. Both halves are scaled on their own and added at the end of a strip.
#pragma once

#include "../ptx/mma.cuh"
#include "direct_parts.cuh"

namespace fastinfer::cuda {

// c += a b, a unsigned and b signed bytes.
__device__ __forceinline__ void mma_16832(int (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float max_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

// x of a rank's columns, [token][pair of 64-column blocks][block][byte][64 columns], and factors
// {2^(e - 28), -8 2^(e - 28) sum X} of the upper and the lower two bytes, [pair][2 tokens][2]. A
// warp takes pairs; x is asked for as it is and made into bytes in place. Columns of a lane: 2t, 2t
// + 8, 2t + 1, 2t + 9 of 16, as the nibbles of a word lie.
struct ByteStage {
  static constexpr int kBits = 28, kAtOnce = 2;
  const SkinnyParams& p;
  const uint32_t x, factors;
  const int slice, pairs, warp, lane;

  __device__ __forceinline__ void load() const {
    const int token = lane / 16, c = lane % 16 * 8;
#pragma unroll 1
    for (int pair = warp; pair < pairs; pair += kDirectWarps) {
      const int column = (slice + pair) * 128 + c, left = max(0, min(p.k - column, 8));
      if (token < p.m)
        cp_async_zero(
            x + token * p.x_pitch + pair * 512 + c * 2,
            static_cast<const uint16_t*>(p.x) + token * p.x_stride + (left > 0 ? column : 0),
            2 * left);
    }
    cp_async_commit();
  }
  // What this warp asked for, two units of one token and pair at a time: a step waits a lot.
  __device__ __forceinline__ void convert() const {
    const int from = lane / 4 * 32 + lane % 4 * 4;
    const int to = lane / 16 * 256 + lane % 4 * 16 + lane / 4 % 4 * 4;
    const int two = p.m - 1;
    const int units = (pairs - warp + kDirectWarps - 1) / kDirectWarps << two;
#pragma unroll 1
    for (int done = 0; done < units; done += kAtOnce) {
      uint32_t raw[kAtOnce][2], at[kAtOnce], factor[kAtOnce], e[kAtOnce], b[kAtOnce][4];
      float v[kAtOnce][4];
      int upper[kAtOnce], lower[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int unit = min(done + u, units - 1);  // the last one twice: the same values
        const int token = unit & two, pair = warp + kDirectWarps * (unit >> two);
        at[u] = x + token * p.x_pitch + pair * 512;
        factor[u] = factors + (pair * 2 + token) * 16;
        raw[u][0] = load_shared_4(at[u] + from), raw[u][1] = load_shared_4(at[u] + from + 16);
      }
      __syncwarp();
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&raw[u][h]));
          v[u][h] = p.x_half ? f.x : __uint_as_float(raw[u][h] << 16);
          v[u][2 + h] = p.x_half ? f.y : __uint_as_float(raw[u][h] & 0xFFFF0000u);
        }
        e[u] = __float_as_uint(max_nan(max_nan(fabsf(v[u][0]), fabsf(v[u][1])),
                                       max_nan(fabsf(v[u][2]), fabsf(v[u][3]))));
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) e[u] = __reduce_max_sync(~0u, e[u]) >> 23;
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const float up = __uint_as_float((254 + kBits - max(e[u], kBits + 1)) << 23);
        uint32_t i[4];  // bytes below the highest are there as byte + 128
#pragma unroll
        for (int j = 0; j < 4; ++j) i[j] = __float2int_rn(v[u][j] * up) + 0x00808080;
        // 4 x 4 transposed: one byte of all four columns.
        const uint32_t low0 = __byte_perm(i[0], i[1], 0x5140);
        const uint32_t low1 = __byte_perm(i[2], i[3], 0x5140);
        const uint32_t high0 = __byte_perm(i[0], i[1], 0x7362);
        const uint32_t high1 = __byte_perm(i[2], i[3], 0x7362);
        b[u][0] = __byte_perm(low0, low1, 0x5410) ^ 0x80808080u;
        b[u][1] = __byte_perm(low0, low1, 0x7632) ^ 0x80808080u;
        b[u][2] = __byte_perm(high0, high1, 0x5410) ^ 0x80808080u;
        b[u][3] = __byte_perm(high0, high1, 0x7632);
        const auto sum = [&](int q) { return __dp4a(static_cast<int>(b[u][q]), 0x01010101, 0); };
        upper[u] = sum(3) * 256 + sum(2), lower[u] = sum(1) * 256 + sum(0);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        upper[u] = __reduce_add_sync(~0u, upper[u]), lower[u] = __reduce_add_sync(~0u, lower[u]);
#pragma unroll
        for (int q = 0; q < 4; ++q)
          asm volatile("st.shared.u32 [%0], %1;" ::"r"(at[u] + to + q * 64), "r"(b[u][q])
                       : "memory");
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (lane > 0) continue;
        const float down = __uint_as_float((max(e[u], kBits + 1) - kBits) << 23);
        const float more = down * 65536.0f;
        asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(factor[u]),
                     "f"(e[u] < 255 ? more : __uint_as_float(0x7FC00000u)),  // infinity, NaN
                     "f"(-8.0f * more * static_cast<float>(upper[u])), "f"(down),
                     "f"(-8.0f * down * static_cast<float>(lower[u]))
                     : "memory");
      }
    }
  }
};

template <int kStrips>
__global__ void __launch_bounds__(32 * kDirectWarps, 1)
    byte_kernel(const __grid_constant__ SkinnyParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  grid_launch_dependents();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const DirectShare share(p, warp, kStrips);
  DirectStream<kStrips> stream(p, share, lane);
  DirectSlot<kStrips> slot[2];
#pragma unroll
  for (auto& s : slot) s.clear();
  const DirectShared at = byte_shared(p.m, p.slice, p.row_shift, 0);
  const uint32_t base = shared_address(shared);
  const ByteStage stage{p, base, base + at.factors, share.slice, share.pairs, warp, lane};
  // x in front of the weights, which would keep it waiting; under programmatic launch half of them
  // first, as they may be read while the kernel in front still writes x.
#pragma unroll 1
  for (int turn = 0; turn < 2; ++turn) {
    if ((turn == 0) == p.weights_first) {
      stream.load(slot[0], 0);
      if (!p.weights_first && share.count > 1) stream.load(slot[1], 0);
    } else {
      grid_wait();
      stage.load();
    }
  }
  if (p.weights_first && share.count > 1) stream.load(slot[1], 0);
  cp_async_wait<0>();
  __syncwarp();
  stage.convert();
  __syncthreads();

  // This lane's 16 bytes of 64 columns: of byte g8 % 2 of the upper (g8 % 4 < 2) or lower half. An
  // absent token reads the first one: a column of B meets its own column of the result only.
  const int g8 = lane / 4;
  const uint32_t x_base = base + (g8 / 4 < p.m ? g8 / 4 * p.x_pitch : 0) + share.skipped * 512 +
                          ((g8 % 4 < 2 ? 2 : 0) + g8 % 2) * 64 + lane % 4 * 16;
  const uint32_t factors_base = base + at.factors + share.skipped * 32 + lane % 4 * 8;
  uint32_t x = x_base, factors = factors_base;
  float total[kStrips][2] = {};

  const auto multiply = [&](const DirectSlot<kStrips>& from) {
    float down, minus, m[kStrips][2];  // m: -z sum(X), 16 times for the second row
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(down), "=f"(minus)
                 : "r"(factors)
                 : "memory");
#pragma unroll
    for (int s = 0; s < kStrips; ++s) m[s][0] = minus, m[s][1] = 16.0f * minus;
    if (p.zeros) {
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        m[s][0] = minus * (static_cast<float>(from.zero[s] & 0xFF) * 0.125f);
        m[s][1] = minus * (static_cast<float>(from.zero[s] >> 8) * 2.0f);
      }
    }
    int acc[kStrips][4] = {};
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const uint4 b = load_shared(x + block * 256);
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        const uint4& w = from.w[s][block];
        const uint32_t first[4] = {w.x & 0x0F0F0F0Fu, w.x, w.y & 0x0F0F0F0Fu, w.y};
        const uint32_t second[4] = {w.z & 0x0F0F0F0Fu, w.z, w.w & 0x0F0F0F0Fu, w.w};
        mma_16832(acc[s], first, b.x, b.y);
        mma_16832(acc[s], second, b.z, b.w);
      }
    }
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      const int low = acc[s][1] * 256 + acc[s][0], all = acc[s][3] * 256 + acc[s][2];
      const float2 scale = from.scales(s, p.scale_dtype);
      const float y0 = fmaf(static_cast<float>(low), down, m[s][0]);
      const float y1 = fmaf(static_cast<float>(all - low), down, m[s][1]) * 0.0625f;
      total[s][0] = fmaf(y0, scale.x, total[s][0]);
      total[s][1] = fmaf(y1, scale.y, total[s][1]);
    }
    x += 512, factors += 32;
  };
  const auto store = [&](int token, int row, float v) {
    if (row >= p.n) return;
    const int64_t at = token * p.out_stride + row;
    if (p.x_half) {
      if (p.bias) v = __fadd_rn(v, to_float(static_cast<const __half*>(p.bias)[row]));
      static_cast<__half*>(p.out)[at] = from_float<__half>(v);
    } else {
      if (p.bias) v = __fadd_rn(v, to_float(static_cast<const __nv_bfloat16*>(p.bias)[row]));
      static_cast<__nv_bfloat16*>(p.out)[at] = from_float<__nv_bfloat16>(v);
    }
  };
  const DirectSums sums{p, share, reinterpret_cast<float*>(shared + at.partial),
                        reinterpret_cast<float*>(shared + at.sums)};
  bool loaded = true;
#pragma unroll 1
  for (int done = 0; share.begin + done < share.end; done += share.group) {
#pragma unroll 1
    for (int pair = 0; pair < share.count; pair += 2) {
      // The compiler counts all loads with one scoreboard: direct.cuh.
      if (!loaded && pair + 1 < share.count) stream.load(slot[1], slot[0].here(p, total[0][0]));
      loaded = false;
      multiply(slot[0]);
      stream.load(slot[0], slot[1].here(p, total[0][0]));
      if (pair + 1 < share.count) multiply(slot[1]);
    }
    // Upper and lower bytes of a token are neighbours: one keeps row g8, the other g8 + 8.
    const bool odd = lane & 1;
    const int token = lane % 4 / 2;
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      const float keep = odd ? total[s][1] : total[s][0], give = odd ? total[s][0] : total[s][1];
      const float v = keep + __shfl_xor_sync(~0u, give, 1);
      if (token < p.m)
        sums.mine(done + share.row_part * kStrips + s)[token * kDirectPitch + g8 + odd * 8] = v;
      total[s][0] = total[s][1] = 0.0f;
    }
    x = x_base, factors = factors_base;
    sums.add_up(done, store);
  }
  sums.exchange(store);
}

}  // namespace fastinfer::cuda
