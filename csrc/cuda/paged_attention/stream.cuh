// The loader: keys and values of the slot's tiles into a ring of shared memory stages, kStages - 1
// steps ahead of the arithmetic and across the borders of items. Every warp loads its own slice,
// one lane per key looks the page up, one step before the copy needs it. With the first keys of an
// item come its queries, for which there is one buffer: behind those of later steps they would have
// to queue. Whoever finds them missing there loads them when they are needed.
//
// Keys outside [low, min(len, end of the piece)) are not touched; their rows become 0.
#pragma once

#include "../ptx/async_copy.cuh"
#include "../ptx/mma.cuh"
#include "../ptx/tma.cuh"
#include "layout.cuh"

namespace fastinfer::cuda {

template <class F, int D, class L, class P>
struct Stream {
  const P& p;
  const Slot& slot;
  uint32_t shared;  // of the ring
  uint32_t table;   // in shared memory
  bool near;        // the table is there
  // Else, where 32 pages hold a step, this lane has the entries of columns `column` + lane and + 32
  // of the sequence, so that no step waits for its pages. Not with two stages (D = 256), where it
  // was 1.5 % slower.
  bool lined;
  int column, line, next_line;
  Walk walk;
  int base;          // first key of the next step of the CTA
  bool more, fresh;  // fresh: the next step is the first one of its item
  int fetched;       // item whose queries are in the buffer: its position, or -1
  // Key of this lane in the next step.
  int page, place, head;
  bool valid, any;
  bool reached;  // valid, whatever the table says
  bool starts;   // an item
  int sequence, row_block, position;

  __device__ __forceinline__ Stream(const P& params, const Slot& s, const Walk& start,
                                    uint32_t ring, bool table_near)
      : p(params), slot(s), shared(ring), table(ring + L::kTable), near(table_near), walk(start) {
    more = fresh = true;
    lined = L::kStages > 2 && p.table && !near && p.page_shift >= 0 &&
            p.page_size >= L::kStepTokens / 32;
    fetched = -1;
    while (more && !walk.has_tiles()) more = walk.next(p, slot);
    base = walk.tile * kPlanTile;
    if (__builtin_expect(more && lined, 0)) load_lines();
  }

  __device__ __forceinline__ int entry(int at) const {
    return at < p.columns ? __ldg(p.table + walk.b * p.table_stride + at) : -1;
  }
  __device__ __forceinline__ void load_lines() {
    column = base >> p.page_shift;
    line = entry(column + lane()), next_line = entry(column + 32 + lane());
  }

  static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }

  static __device__ __forceinline__ int shared_int(uint32_t address) {
    int x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    return x;
  }

  // Where the keys of the next step are.
  __device__ __forceinline__ void look_up() {
    any = more;
    valid = reached = false;
    page = place = head = 0;
    if (!more) return;
    const int end = min(walk.len, walk.end * kPlanTile);
    const int key = base + warp() * L::kTokens + lane() % L::kTokens;
    valid = reached = key >= walk.low && key < end;
    head = walk.pair(p, slot);
    row_block = 0;
    if (p.row_blocks > 1) {
      const int pair = head;
      head /= p.row_blocks;
      row_block = pair - head * p.row_blocks;
    }
    starts = fresh;
    fresh = false;
    sequence = walk.b;
    position = walk.position;
    page = walk.row;
    place = key;
    if (__builtin_expect(lined, 0)) {  // as code of its own, behind what short steps run through
      int at = (key >> p.page_shift) - column;
      if (__all_sync(kAllLanes, at >= 32)) {
        line = next_line, column += 32, at -= 32;
        next_line = entry(column + 32 + lane());
      }
      page = __shfl_sync(kAllLanes, line, at);
      if (__any_sync(kAllLanes, at >= 32)) {
        const int other = __shfl_sync(kAllLanes, next_line, at);
        if (at >= 32) page = other;
      }
      place = key & (p.page_size - 1);
      valid = valid && page >= 0;  // a padded row of the batch: zeros, not an address
    } else if (p.table && valid) {
      const uint32_t size = p.page_size;
      const uint32_t own =
          p.page_shift >= 0 ? key >> p.page_shift : static_cast<uint32_t>(key) / size;
      page = near ? shared_int(table + (walk.b * p.columns + own) * 4)
                  : __ldg(p.table + walk.b * p.table_stride + own);
      place = key - own * size;
      valid = page >= 0;
    }
    base += L::kStepTokens;
    if (base >= end) {
      do {
        more = walk.next(p, slot);
      } while (more && !walk.has_tiles());
      base = walk.tile * kPlanTile;
      fresh = true;
      if (__builtin_expect(more && lined, 0)) load_lines();
    }
  }

  // Copies the step that look_up() prepared into `stage`, which every warp of the team has left.
  // `query`: queries may be read.
  __device__ __forceinline__ void issue(int stage, bool query) {
    if (!any) {
      cp_async_commit();  // the arithmetic counts groups
      return;
    }
    if constexpr (L::kFetches)
      if (starts && query && fetched < 0 && p.row_tiles <= L::kFetchTiles && p.query_packs)
        fetch_query();
    const uint32_t slice = shared + (stage * P::kWarps + warp()) * L::kSlice;
    if constexpr (L::kBoxes)
      issue_boxes(slice, shared + L::kFull + (stage * P::kWarps + warp()) * 8);
    else if (p.packs)
      issue_packs(slice);
    else
      copy_elements(p, slice, page, place, head, valid);
    if constexpr (F::kBytes == 1)
      if (p.scale_per_token_k || p.scale_per_token_v) issue_scales(slice);
    cp_async_commit();
  }

  // Every warp fetches its part, and waits for it with its first keys.
  __device__ __forceinline__ void fetch_query() {
    constexpr int kPacks = D / 8;
    const int block = 16 * p.row_tiles, rows = min(p.rows - row_block * block, block);
    fetched = position;
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * kPacks; i += P::kThreads) {
      const int row = i / kPacks, column = i % kPacks * 8, r = row_block * block + row;
      const int token = p.q_len == 1 ? 0 : r / p.group;
      const int at = head * p.group + r - token * p.group;
      const uint16_t* from = static_cast<const uint16_t*>(p.q) + sequence * p.q_batch +
                             token * p.q_token + at * p.q_head;
      const bool inside = column < p.dim;
      cp_async_16(shared + L::kFetched + row * L::kQueryPitch + column * 2,
                  from + (inside ? column : 0), inside);
    }
  }

  __device__ __forceinline__ void issue_packs(uint32_t slice) {
    constexpr int kPacks = D * F::kBytes / 16;  // of a row
    constexpr int kRows = 32 / kPacks;          // per instruction of the warp
    static_assert(kPacks <= 32, "a row is copied by one instruction");
    const uint32_t offset = page * p.page16 + place * p.token16 + head * p.head16;
    const uint32_t seen = __ballot_sync(kAllLanes, valid);
    const int column = lane() % kPacks;
    const bool inside = column < p.dim * F::kBytes / 16;  // the rest of the row is zeros
    const char* k = static_cast<const char*>(p.k) + (inside ? column * 16 : 0);
    const char* v = static_cast<const char*>(p.v) + (inside ? column * 16 : 0);
#pragma unroll
    for (int i = 0; i < L::kTokens / kRows; ++i) {
      const int row = i * kRows + lane() / kPacks;
      const bool there = inside && (seen >> row & 1);
      // An address that is not read from must still be a sane one.
      const uint32_t units = __shfl_sync(kAllLanes, offset, row);
      const uint64_t bytes = there ? static_cast<uint64_t>(units) * 16 : 0;
      const uint32_t to = slice + row * L::kPitch + column * 16;
      cp_async_16(to, k + bytes, there);
      cp_async_16(to + L::kV, v + bytes, there);
    }
  }

  // Boxes of 16 keys, whose pages their first keys' lanes know, with whatever is behind the last
  // key of the sequence. A page that does not exist arrives as zeros.
  __device__ __forceinline__ void issue_boxes(uint32_t slice, uint32_t barrier) {
    constexpr int kBox = 16 * L::kPitch;
    const uint32_t boxes = __ballot_sync(kAllLanes, lane() % 16 == 0 && reached);
    if (lane() == 0)
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                   "r"(__popc(boxes) * 2 * kBox)
                   : "memory");
    __syncwarp();
    if (boxes >> lane() & 1) {
      load_box(slice + lane() / 16 * kBox, &p.k_map, barrier);
      load_box(slice + lane() / 16 * kBox + L::kV, &p.v_map, barrier);
    }
  }

  __device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap* map, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
        "l"(map), "r"(barrier), "r"(0), "r"(place), "r"(head), "r"(page)
        : "memory");
  }

  __device__ __forceinline__ void issue_scales(uint32_t slice) {
    static_assert(F::kBytes == 2 || L::kTokens == 32, "a lane per key");
    const uint32_t to = slice + L::kScales + lane() * 4;
    if (p.scale_per_token_k)
      cp_async_4(
          to,
          valid ? p.k_scale + page * p.ks_page + place * p.ks_token + head * p.ks_head : p.k_scale,
          valid);
    if (p.scale_per_token_v)
      cp_async_4(
          to + L::kTokens * 4,
          valid ? p.v_scale + page * p.vs_page + place * p.vs_token + head * p.vs_head : p.v_scale,
          valid);
  }

  // Any strides and alignment, any distance: element by element.
  static __device__ __noinline__ void copy_elements(const P& p, uint32_t slice, int page, int place,
                                                    int head, bool valid) {
#pragma unroll 1
    for (int row = 0; row < L::kTokens; ++row) {
      const int64_t row_page = __shfl_sync(kAllLanes, page, row);
      const int64_t row_place = __shfl_sync(kAllLanes, place, row);
      const bool there = __shfl_sync(kAllLanes, valid, row);
      const int64_t k_at = row_page * p.k_page + row_place * p.k_token + head * p.k_head;
      const int64_t v_at = row_page * p.v_page + row_place * p.v_token + head * p.v_head;
#pragma unroll 1
      for (int i = lane(); i < D; i += 32) {
        const uint32_t to = slice + row * L::kPitch + i * F::kBytes;
        const bool read = there && i < p.dim;
        if constexpr (F::kBytes == 2) {
          const uint16_t a = read ? static_cast<const uint16_t*>(p.k)[k_at + i] : 0;
          const uint16_t c = read ? static_cast<const uint16_t*>(p.v)[v_at + i] : 0;
          asm volatile("st.shared.b16 [%0], %1;" ::"r"(to), "h"(a) : "memory");
          asm volatile("st.shared.b16 [%0], %1;" ::"r"(to + L::kV), "h"(c) : "memory");
        } else {
          const uint32_t a = read ? static_cast<const uint8_t*>(p.k)[k_at + i] : 0;
          const uint32_t c = read ? static_cast<const uint8_t*>(p.v)[v_at + i] : 0;
          asm volatile("st.shared.b8 [%0], %1;" ::"r"(to), "r"(a) : "memory");
          asm volatile("st.shared.b8 [%0], %1;" ::"r"(to + L::kV), "r"(c) : "memory");
        }
      }
    }
  }
};

}  // namespace fastinfer::cuda
