// One-shot or two-shot: host side, pure.
//
// A rank sends (world - 1) * n bytes in one-shot and 2 * n * (world - 1) / world in two-shot, which
// has one more trip over the link. Two ranks send the same either way; more ranks win once the
// bytes saved cost more than the trip.
#pragma once

#include <cstdint>

namespace fastinfer {

constexpr int64_t kTripBytes = 400 * 1024;  // that a link carries in the time of a trip

constexpr bool all_reduce_two_shot(int world, int64_t bytes) {
  const int64_t saved = (world - 1) * bytes - 2 * (world - 1) * bytes / world;
  return saved > kTripBytes;
}

static_assert(!all_reduce_two_shot(2, int64_t{1} << 30), "nothing is saved");
static_assert(!all_reduce_two_shot(4, 128 << 10) && all_reduce_two_shot(4, 512 << 10), "four");
static_assert(!all_reduce_two_shot(8, 32 << 10) && all_reduce_two_shot(8, 128 << 10), "eight");

}  // namespace fastinfer
