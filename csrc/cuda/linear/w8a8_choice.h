// Which kernel computes a w8a8_linear call: pure host code, tested by the static_asserts below.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace fastinfer::cuda {

enum class W8a8Path { skinny, tiles, sm90 };

struct W8a8Choice {
  W8a8Path path;
  // sm90: channels of a tile; CTAs that share weights; CTAs that share K.
  int width, pair, split;
};

constexpr int64_t kSkinnyTokens = 16, kSkinnyTokensPortable = 64;

constexpr int64_t w8a8_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Nanoseconds of the busiest SM, fitted to measurements on an H100: a step of K costs 40 + 2.7 per
// channel, at least 300 (loads); sharing K costs an exchange.
constexpr int64_t w8a8_time(int64_t m, int64_t n, int64_t k, const W8a8Choice& c, int sms) {
  const int64_t units = w8a8_ceil(m, 128 * c.pair) * w8a8_ceil(n, c.width);
  const int64_t rounds = w8a8_ceil(units, sms / (c.pair * c.split));
  const int64_t step = 40 + 27 * c.width / 10;
  return rounds * w8a8_ceil(w8a8_ceil(k, 128), c.split) * (step > 300 ? step : 300) +
         (c.split == 1 ? 0
          : m > 64     ? 4000
                       : 3000);
}

constexpr W8a8Choice choose_w8a8(int64_t m, int64_t n, int64_t k, bool aligned, int sms,
                                 bool sm90) {
  const bool wgmma = sm90 && aligned && k > 0;
  if (m <= (wgmma ? kSkinnyTokens : kSkinnyTokensPortable)) return {W8a8Path::skinny, 0, 0, 0};
  if (!wgmma) return {W8a8Path::tiles, 0, 0, 0};
  // Wider tiles read less per product, narrow ones may leave fewer SMs idle. Pairs pay for the
  // widest tile only.
  W8a8Choice best{W8a8Path::sm90, 256, m > 128 ? 2 : 1, 1};
  int64_t least = w8a8_time(m, n, k, best, sms);
  for (int width : {192, 128, 64})
    for (int split : {1, 2}) {
      const W8a8Choice c{W8a8Path::sm90, width, 1, split};
      // One tile per cluster, two steps or more and 32 channels per CTA.
      if (split > 1 && (w8a8_ceil(m, 128) * w8a8_ceil(n, width) * split > sms || k < 256 * split ||
                        width / 32 % split != 0))
        continue;
      const int64_t time = w8a8_time(m, n, k, c, sms);
      if (time < least) best = c, least = time;
    }
  return best;
}

static_assert(choose_w8a8(16, 4096, 4096, true, 132, true).path == W8a8Path::skinny);
static_assert(choose_w8a8(17, 4096, 4096, true, 132, true).path == W8a8Path::sm90);
static_assert(choose_w8a8(64, 4096, 4096, true, 132, false).path == W8a8Path::skinny);
static_assert(choose_w8a8(65, 4096, 4096, true, 132, false).path == W8a8Path::tiles);
static_assert(choose_w8a8(65, 4096, 4095, false, 132, true).path == W8a8Path::tiles);
static_assert(choose_w8a8(65, 4096, 0, true, 132, true).path == W8a8Path::tiles);
static_assert(choose_w8a8(1024, 4096, 4096, true, 132, true).width == 256);
static_assert(choose_w8a8(1024, 4096, 4096, true, 132, true).pair == 2);
static_assert(choose_w8a8(1024, 6144, 4096, true, 132, true).width == 192);
static_assert(choose_w8a8(1024, 28672, 4096, true, 132, true).width == 256);
static_assert(choose_w8a8(512, 28672, 4096, true, 132, true).width == 128);
static_assert(choose_w8a8(64, 4096, 4096, true, 132, true).width == 64);
static_assert(choose_w8a8(64, 4096, 4096, true, 132, true).split == 2);
static_assert(choose_w8a8(256, 4096, 4096, true, 132, true).split == 1);
static_assert(choose_w8a8(64, 28672, 4096, true, 132, true).width == 256);

}  // namespace fastinfer::cuda
