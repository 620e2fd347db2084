// One-shot or two-shot: host side, pure.
//
// A rank sends (world - 1) * n bytes in one-shot and 2 * n * (world - 1) / world in two-shot, which
// has one more trip over the link: 1.2 us between two H200s, in which 300 GB/s carry kTripBytes.
// More than two ranks take two-shot once it saves more bytes than that. Two ranks send the same
// either way; above kTwoRankBytes, measured, it pays that each adds up only half.
#pragma once

#include <cstdint>

namespace fastinfer {

constexpr int64_t kTripBytes = 360 << 10, kTwoRankBytes = 4 << 20;

constexpr bool all_reduce_two_shot(int world, int64_t bytes) {
  if (world == 2) return bytes >= kTwoRankBytes;
  const int64_t saved = (world - 1) * bytes - 2 * (world - 1) * bytes / world;
  return saved > kTripBytes;
}

static_assert(!all_reduce_two_shot(2, 1 << 20) && all_reduce_two_shot(2, 8 << 20), "two");
static_assert(!all_reduce_two_shot(4, 128 << 10) && all_reduce_two_shot(4, 512 << 10), "four");
static_assert(!all_reduce_two_shot(8, 32 << 10) && all_reduce_two_shot(8, 128 << 10), "eight");

}  // namespace fastinfer
