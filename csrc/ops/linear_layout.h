// Packed weight layouts: where the code of row n (output channel), column k (input channel) lies.
//
// CPU, "FI4C" / "FI8C": int32 [ceil(N/16), ceil(K/8 | K/4), 16]. Word (n/16, k/8, n%16) holds 8
//   (4) neighbouring k of one channel, lowest k in the lowest bits: 16 channels side by side, as
//   one 512-bit load. Scales fp32 and zeros (uint8 or fp32) [G, n_pad], n_pad = N rounded up to 16.
//
// CUDA, "FI4" / "FI8": int32 [ceil(N/64), ceil(K/64), 512 | 1024], the order in which the lanes of
//   mma.m16n8k16 / wgmma hold the A operand, weights being A. A 64 x 64 block is
//   [4 strips of 16 n][32 lanes][4 steps of 16 k] x 1 (2) words. Lane 4*g8 + t owns n = g8, g8+8
//   and k = 2t, 2t+1, 2t+8, 2t+9 of a 16 x 16 tile, in registers a = (n >= 8) + 2 * (k >= 8), each
//   an even k (half 0) and an odd k (half 1). 4 bit: nibble a + 4 * half, so that (w >> 4a) &
//   0x000F000F is register a. 8 bit: word a / 2, byte a % 2 + 2 * half. Scales and zeros [G,
//   ceil(N/64), 8, 8]: entry [g8][2j + h] is n = 64 b + 16 j + 8 h + g8.
//
// Padding codes equal the zero point and padding scales are 0, so padded weights are 0 (with float
// zeros: their zero is 0). The last dimension of qweight tells the layouts apart.
#pragma once

#include <cstdint>

namespace fastinfer {

constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct PackedLayout {
  bool cuda;
  int bits;
  int64_t n, k;

  constexpr int64_t per_word() const { return 32 / bits; }
  constexpr int64_t rows_per_block() const { return cuda ? 64 : 16; }
  constexpr int64_t blocks() const { return div_up(n, rows_per_block()); }
  constexpr int64_t n_pad() const { return blocks() * rows_per_block(); }
  // The second and third dimension of qweight.
  constexpr int64_t steps() const { return cuda ? div_up(k, 64) : div_up(k, per_word()); }
  constexpr int64_t inner() const { return cuda ? 128 * bits : 16; }
  constexpr int64_t k_pad() const { return steps() * (cuda ? 64 : per_word()); }

  constexpr int64_t block_words() const { return steps() * inner(); }
  constexpr int64_t scale(int64_t group, int64_t row) const {
    if (!cuda) return group * n_pad() + row;
    const int64_t r = row % 64;
    return group * n_pad() + row / 64 * 64 + r % 8 * 8 + r / 16 * 2 + r % 16 / 8;
  }
};

// group_size as given (-1: one group) to columns per group; K = 0 has no groups.
constexpr int64_t group_columns(int64_t group_size, int64_t k) {
  return group_size > 0 ? group_size : (k > 0 ? k : 1);
}

}  // namespace fastinfer
