// Bytes <-> packed words for one block of rows (16 on the CPU, 64 for CUDA) of linear_layout.h.
//
// codes is [rows_per_block][k_pad], one code per byte, padding included; words is the block's run
// of qweight. Each word is put together from the few contiguous bytes it holds, so both directions
// run at memory-like speed without index arithmetic per code.
#pragma once

#include <cstring>

#include "linear_layout.h"

namespace fastinfer {

// Eight bytes b0..b7 (each < 16) to nibbles, b0 lowest, and back.
inline uint32_t nibbles_of(uint64_t bytes) {
  bytes = (bytes | bytes >> 4) & 0x00ff00ff00ff00ffull;
  bytes = (bytes | bytes >> 8) & 0x0000ffff0000ffffull;
  return static_cast<uint32_t>(bytes | bytes >> 16);
}
inline uint64_t bytes_of(uint32_t nibbles) {
  uint64_t bytes = nibbles;
  bytes = (bytes | bytes << 16) & 0x0000ffff0000ffffull;
  bytes = (bytes | bytes << 8) & 0x00ff00ff00ff00ffull;
  return (bytes | bytes << 4) & 0x0f0f0f0f0f0f0f0full;
}

inline void pack_cpu_block(const PackedLayout& layout, const uint8_t* codes, uint32_t* words) {
  const int64_t per_word = layout.per_word(), k_pad = layout.k_pad();
  for (int64_t row = 0; row < 16; ++row)
    for (int64_t step = 0; step < layout.steps(); ++step) {
      uint64_t bytes = 0;
      std::memcpy(&bytes, codes + row * k_pad + step * per_word, per_word);
      words[step * 16 + row] = layout.bits == 4 ? nibbles_of(bytes) : static_cast<uint32_t>(bytes);
    }
}

inline void unpack_cpu_block(const PackedLayout& layout, const uint32_t* words, uint8_t* codes) {
  const int64_t per_word = layout.per_word(), k_pad = layout.k_pad();
  for (int64_t row = 0; row < 16; ++row)
    for (int64_t step = 0; step < layout.steps(); ++step) {
      const uint32_t word = words[step * 16 + row];
      const uint64_t bytes = layout.bits == 4 ? bytes_of(word) : word;
      std::memcpy(codes + row * k_pad + step * per_word, &bytes, per_word);
    }
}

// f(first code of the 16 x 16 tile's even/odd pair for lane and step, its words) over a 64-row
// block.
template <class F>
void each_cuda_lane(const PackedLayout& layout, F&& f) {
  const int64_t words_per_lane = layout.bits / 4;
  int64_t word = 0;
  for (int64_t block = 0; block < layout.steps(); ++block)
    for (int64_t strip = 0; strip < 4; ++strip)
      for (int64_t lane = 0; lane < 32; ++lane)
        for (int64_t step = 0; step < 4; ++step, word += words_per_lane)
          f((strip * 16 + lane / 4) * layout.k_pad() + block * 64 + step * 16 + lane % 4 * 2, word);
}

// Register a of a lane: rows +8 when a is odd, columns +8 from a = 2 on; two neighbouring codes.
inline int64_t register_offset(const PackedLayout& layout, int a) {
  return a % 2 * 8 * layout.k_pad() + a / 2 * 8;
}

inline void pack_cuda_block(const PackedLayout& layout, const uint8_t* codes, uint32_t* words) {
  each_cuda_lane(layout, [&](int64_t first, int64_t word) {
    uint32_t out[2] = {0, 0};
    for (int a = 0; a < 4; ++a) {
      const uint8_t* pair = codes + first + register_offset(layout, a);
      if (layout.bits == 4)
        out[0] |= uint32_t{pair[0]} << 4 * a | uint32_t{pair[1]} << (4 * a + 16);
      else
        out[a / 2] |= uint32_t{pair[0]} << 8 * (a % 2) | uint32_t{pair[1]} << (8 * (a % 2) + 16);
    }
    words[word] = out[0];
    if (layout.bits == 8) words[word + 1] = out[1];
  });
}

inline void unpack_cuda_block(const PackedLayout& layout, const uint32_t* words, uint8_t* codes) {
  each_cuda_lane(layout, [&](int64_t first, int64_t word) {
    for (int a = 0; a < 4; ++a) {
      uint8_t* pair = codes + first + register_offset(layout, a);
      const uint32_t w = layout.bits == 4 ? words[word] >> 4 * a & 0x000f000fu
                                          : words[word + a / 2] >> 8 * (a % 2) & 0x00ff00ffu;
      pair[0] = static_cast<uint8_t>(w);
      pair[1] = static_cast<uint8_t>(w >> 16);
    }
  });
}

}  // namespace fastinfer
