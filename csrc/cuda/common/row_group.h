// How rows are laid over threads: host side, pure.
//
// A row is cut into packs of 16 bytes. `threads` neighbouring threads share a row: a power of two
// up to a warp, else whole warps; thread t holds packs t, t + threads, ... The choice depends on
// the length of a row alone, never on the number of rows, so that a row is summed in the same order
// whatever it is batched with.
#pragma once

#include <cstdint>

namespace fastinfer::cuda {

struct RowLayout {
  int threads;         // per row
  int rows_per_block;  // rows * threads is at least kMinBlock
};

constexpr int kMaxRowThreads = 1024, kMinBlock = 128;

// At most `packs_per_thread` packs in one thread as long as kMaxRowThreads are enough for that.
constexpr RowLayout row_layout(int64_t packs, int packs_per_thread) {
  const int64_t need = (packs + packs_per_thread - 1) / packs_per_thread;
  int threads = 1;
  if (need <= 32) {
    while (threads < need) threads *= 2;
  } else {
    threads = static_cast<int>(need < kMaxRowThreads ? (need + 31) / 32 * 32 : kMaxRowThreads);
  }
  return {threads, threads < kMinBlock ? kMinBlock / threads : 1};
}

static_assert(row_layout(512, 2).threads == 256 && row_layout(512, 2).rows_per_block == 1, "4096");
static_assert(row_layout(16, 2).threads == 8 && row_layout(16, 2).rows_per_block == 16, "128");
static_assert(row_layout(96, 2).threads == 64 && row_layout(96, 2).rows_per_block == 2, "768");
static_assert(row_layout(0, 2).threads == 1 && row_layout(1 << 20, 2).threads == 1024, "limits");

// Elementwise work on rows: tiles `width` threads across and `rows` down, a pack per thread. No
// element's value depends on the tile: little work is cut finely so that it reaches many
// multiprocessors, much work into full blocks.
struct TileLayout {
  int width, rows;
};

constexpr TileLayout tile_layout(int64_t rows, int64_t packs, int threads, int sms) {
  const int most = rows * packs < int64_t{sms} * threads ? 64 : threads;
  int width = 1;
  while (width < most && width < packs) width *= 2;
  return {width, most / width};
}

static_assert(tile_layout(1, 512, 256, 132).width == 64, "one row: eight blocks");
static_assert(tile_layout(8192, 512, 256, 132).width == 256, "many rows: two blocks each");
static_assert(tile_layout(8192, 16, 256, 132).rows == 16, "short rows share a block");

}  // namespace fastinfer::cuda
