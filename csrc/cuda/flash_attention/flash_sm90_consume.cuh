// The consumer warpgroups of the sm_90a kernel: products and softmax.
#pragma once

#include "flash_sm90_output.cuh"

namespace fastinfer::cuda::flash {

template <class T, class Tile, bool kModify>
struct Consumer : OutputRows<T, Tile> {
  static constexpr int kD = Tile::kDim, kBuffersQ = Tile::kStagesQ;
  static constexpr int kKeys = Tile::kKeys, kStages = Tile::kStages;
  // Softcap and ALiBi at 128 columns leave no registers for it.
  static constexpr bool kStoreAmongExponents = kD <= 64 || !kModify;

  using Rows = OutputRows<T, Tile>;
  using Rows::barriers, Rows::finish, Rows::first_row, Rows::group, Rows::leaves_by_tma, Rows::out,
      Rows::p, Rows::q_tile, Rows::return_rows, Rows::send_rows, Rows::stage_rows, Rows::state,
      Rows::store;

  const uint32_t k_tiles, v_tiles;
  uint32_t probabilities[kKeys / 4];
  Ring<kStages> k_ring;
  Ring<Tile::kStagesV> v_ring;
  Ring<Tile::kStagesQ> q_ring;

  template <class... Args>
  __device__ __forceinline__ Consumer(uint32_t k_tiles, uint32_t v_tiles, Args&&... rows)
      : Rows(rows...), k_tiles(k_tiles), v_tiles(v_tiles) {}

  static __device__ __forceinline__ void release(uint64_t* barrier) {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier);
  }

  // The buffers that a product has been read from.
  __device__ __forceinline__ void scores_done(bool last_of_unit) {
    release(&barriers.k_empty[k_ring.index]);
    k_ring.next();
    if (!last_of_unit) return;
    // With two buffers the output leaves through this one, before it goes back.
    if (kBuffersQ == 1) release(&barriers.q_empty[0][group]);
    q_ring.next();
  }
  __device__ __forceinline__ void output_done() {
    release(&barriers.v_empty[v_ring.index]);
    v_ring.next();
  }

  // S = Q K^T, not waited for.
  __device__ __forceinline__ void start_scores(float (&s)[kKeys / 2]) {
    const uint64_t q = ptx::slab_descriptor(
        ptx::uniform(q_tile + q_ring.index * Tile::kQBytes + group * 64 * 128), 16);
    const uint64_t k =
        ptx::slab_descriptor(ptx::uniform(k_tiles + k_ring.index * Tile::kTileBytes), 16);
#pragma unroll
    for (int i = 0; i < kD / 16; ++i) {
      const int slab = i / 4, inside = i % 4 * 32;
      ptx::wgmma_ss<T, kKeys>(s, q + ((slab * Tile::kRows * 128 + inside) >> 4),
                              k + ((slab * kKeys * 128 + inside) >> 4), i > 0);
    }
    ptx::wgmma_commit();
  }
  // The current V tile; to be asked for well ahead of its use.
  __device__ __forceinline__ uint32_t v_tile() const {
    return ptx::uniform(v_tiles + v_ring.index * Tile::kTileBytes);
  }
  // O += P V, not waited for.
  __device__ __forceinline__ void start_output(uint32_t at, bool fresh) {
    const uint64_t v = ptx::slab_descriptor(at, kKeys * 128);
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i)
      ptx::wgmma_rs<T, kD>(out, probabilities + 4 * i, v + (i * 2048 >> 4), i > 0 || !fresh);
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void pack(const float (&s)[kKeys / 2]) {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) probabilities[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
  }

  // Softcap, ALiBi and masks on the scores of tile `tile`; `row`: this thread's first row.
  template <bool kMask>
  __device__ __forceinline__ void treat(float (&s)[kKeys / 2], const Work& w, int32_t tile,
                                        int32_t row) {
    const int32_t column = tile * kKeys + 2 * (threadIdx.x % 4);
    if constexpr (kModify) {
      const int32_t shift = w.len_k - w.len_q;
      modify_scores(p, s, alibi_slope(p, w), column, row + shift, row + 8 + shift);
    }
    if constexpr (kMask) {
      const int32_t top = w.row + 64 * group;
      const Range low = row_limits(p, w, row), high = row_limits(p, w, row + 8);
      if (row_limits(p, w, top).end < (tile + 1) * kKeys) mask_right(s, column, low.end, high.end);
      if (row_limits(p, w, top + 63).begin > tile * kKeys)
        mask_left(s, column, low.begin, high.begin);
    }
  }

  // The same on the first tile of a unit, which may or may not need a mask.
  __device__ __forceinline__ void treat_first(float (&s)[kKeys / 2], const Slot& slot,
                                              int32_t tile) {
    const Range open = slot.open[group];
    if (kModify || tile < open.begin || tile >= open.end)
      treat<true>(s, slot.w, tile, first_row(slot.w));
  }

  // Zeros in the rows of the current V tile that no row of the work sees. All consumers.
  __device__ __forceinline__ void clean_values(Range keys, int32_t tile) {
    const int32_t first = tile * kKeys;
    if (first >= keys.begin && first + kKeys <= keys.end) return;
    ptx::mbarrier_wait(&barriers.v_full[v_ring.index], v_ring.phase);
    const uint32_t v = v_tiles + v_ring.index * Tile::kTileBytes;
    const int thread = threadIdx.x - 128;
#pragma unroll 1  // rare; what an unrolled loop prepares would take registers from all the rest
    for (int i = thread; i < kKeys * kD / 8; i += 128 * Tile::kGroups) {
      const int32_t key = first + i / 8 % kKeys;
      if (key < keys.begin || key >= keys.end)
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(v + i * 16), "r"(0)
                     : "memory");
    }
    ptx::proxy_fence_shared();
    ptx::named_sync(kCleanBarrier, 128 * Tile::kGroups);
  }
  static constexpr uint32_t kTurnBarrier = 1, kCleanBarrier = 1 + Tile::kGroups,
                            kStoreBarrier = 2 + Tile::kGroups;

  __device__ __forceinline__ void wait_turn() {
    if constexpr (Tile::kGroups > 1) ptx::named_sync(kTurnBarrier + group, 256);
  }
  __device__ __forceinline__ void pass_turn() {
    if constexpr (Tile::kGroups > 1)
      ptx::named_arrive(kTurnBarrier + (group + 1) % Tile::kGroups, 256);
  }

  // The assembler would wait for O before it looks for the maximum. It does not move the wait over
  // a store, so one that needs the maximum is put in between.
  __device__ __forceinline__ void pin(float x) {
    asm volatile(
        "{\n.reg .pred first;\nsetp.eq.u32 first, %1, 0;\n@first st.shared.f32 [%0], %2;\n}" ::"r"(
            ptx::shared_address(&barriers.pinned[threadIdx.x / 32])),
        "r"(threadIdx.x % 32), "f"(x)
        : "memory");
  }

  // Starts S of the next keys and O += P V of those before them, in this group's turn; S is there
  // at the end, O is not.
  __device__ __forceinline__ void both_products(float (&s)[kKeys / 2], uint32_t v, bool fresh) {
    ptx::mbarrier_wait(&barriers.k_full[k_ring.index], k_ring.phase);
    wait_turn();
    ptx::wgmma_fence();
    start_scores(s);
    ptx::mbarrier_wait(&barriers.v_full[v_ring.index], v_ring.phase);
    ptx::wgmma_fence();
    start_output(v, fresh);
    pass_turn();
    ptx::wgmma_wait<1>();
    ptx::hold(s);
  }
  __device__ __forceinline__ void finish_output() {
    ptx::wgmma_wait<0>();
    ptx::hold(out);
    ptx::hold(probabilities);
    output_done();
  }

  // S of `tile` and O += P V of the tile before it (in order of work), then P of `tile`.
  template <bool kMask>
  __device__ __forceinline__ void step(float (&s)[kKeys / 2], const Work& w, int32_t tile,
                                       int32_t first, bool fresh, int32_t row, float factor) {
    const uint32_t v = v_tile();
    both_products(s, v, fresh);
    scores_done(tile == first);
    treat<kMask>(s, w, tile, row);
    float origin[2], keep[2];
    state.template raise<2>(s, factor, origin, keep);
    pin(keep[0] + keep[1]);
    // The products are done by now: exponentials, whose unit is the slowest, and everything else
    // that is left share the time.
    finish_output();
    state.template exponents<2>(s, factor, origin, keep);
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) out[i] *= keep[i % 4 / 2];
    pack(s);
  }

  // The tiles in front of the first one of a unit of work.
  __device__ __forceinline__ void remaining_tiles(float (&s)[kKeys / 2], const Slot& slot,
                                                  float factor) {
    const int32_t first = slot.keys.begin / kKeys, last = (slot.keys.end - 1) / kKeys;
    const int32_t row = first_row(slot.w);
    int32_t tile = last - 1;
    if constexpr (kD > 192) {
      // One body, masked: registers are short, and the products long enough to hide the mask.
      for (; tile >= first; --tile)
        step<true>(s, slot.w, tile, first, tile == last - 1, row, factor);
    } else {
      // Masked tiles at the right, open tiles, masked tiles at the left. Two bodies: with a branch
      // around the mask in a single one, the assembler waits for O before the softmax.
      const Range open = slot.open[group];
#pragma unroll 1
      for (int side = 0; side < 2; ++side) {
        for (const int32_t stop = side ? first : max(first, open.end); tile >= stop; --tile)
          step<true>(s, slot.w, tile, first, tile == last - 1, row, factor);
        for (const int32_t stop = max(first, open.begin); tile >= stop; --tile)
          step<false>(s, slot.w, tile, first, tile == last - 1, row, factor);
      }
    }
  }

  // O += P V of the first tile of keys, on its own.
  __device__ __forceinline__ void last_output(bool fresh) {
    ptx::mbarrier_wait(&barriers.v_full[v_ring.index], v_ring.phase);
    ptx::wgmma_fence();
    start_output(v_tile(), fresh);
    finish_output();
    // All warps are done with Q, too: the output may take its place.
    if (kBuffersQ > 1) ptx::named_sync(kStoreBarrier + group, 128);
  }

  // S of the last tile of keys and its maxima, on its own.
  __device__ __forceinline__ void first_scores(float (&s)[kKeys / 2], const Slot& slot,
                                               RowState& rows, float factor, float (&origin)[2],
                                               float (&keep)[2]) {
    const int32_t first = slot.keys.begin / kKeys, last = (slot.keys.end - 1) / kKeys;
    ptx::mbarrier_wait(&barriers.q_full[q_ring.index][group], q_ring.phase);
    ptx::mbarrier_wait(&barriers.k_full[k_ring.index], k_ring.phase);
    ptx::wgmma_fence();
    start_scores(s);
    ptx::wgmma_wait<0>();
    ptx::hold(s);
    scores_done(last == first);
    treat_first(s, slot, last);
    rows.template raise<2>(s, factor, origin, keep);
  }
  // The same together with the last product of the unit of work before.
  __device__ __forceinline__ void joined_scores(float (&s)[kKeys / 2], const Slot& slot, bool fresh,
                                                RowState& rows, float factor, float (&origin)[2],
                                                float (&keep)[2], float (&total)[2],
                                                float (&weight)[2]) {
    const int32_t first = slot.keys.begin / kKeys, last = (slot.keys.end - 1) / kKeys;
    const uint32_t v = v_tile();
    ptx::mbarrier_wait(&barriers.q_full[q_ring.index][group], q_ring.phase);
    both_products(s, v, fresh);
    scores_done(last == first);
    treat_first(s, slot, last);
    rows.template raise<2>(s, factor, origin, keep);
    state.totals(total);
    Rows::plain_weights(total, weight);
    pin(origin[0] + origin[1]);
    finish_output();
  }
  // From the first probabilities of a unit to all but its last product.
  __device__ __forceinline__ void attend(float (&s)[kKeys / 2], const Slot& slot, float factor) {
    const int32_t first = slot.keys.begin / kKeys, last = (slot.keys.end - 1) / kKeys;
    clean_values(slot.keys, last);
    remaining_tiles(s, slot, factor);
    if (first < last) clean_values(slot.keys, first);
  }

  // One unit of work after the other. The last product of a unit runs together with the first
  // scores of the next, so that the tensor cores have no gap in between.
  __device__ __forceinline__ void run() {
    const float factor = kModify ? 1.0f : p.scale * kLog2e;
    Ring<Tile::kSlots> work;
    float s[kKeys / 2], origin[2], keep[2];
    if (group == 1) pass_turn();  // the first group goes first
    if constexpr (Tile::kStagesQ == 1) {
      // Not with one buffer for Q: the next rows come too late.
      while (true) {
        const Slot& slot = take_work(barriers, work);
        if (!slot.valid) return;
        state = RowState{};  // without keys: weight 0, and `out` is not looked at
        if (slot.keys.begin < slot.keys.end) {
          first_scores(s, slot, state, factor, origin, keep);
          state.template exponents<2>(s, factor, origin, keep);
          pack(s);
          attend(s, slot, factor);
          last_output(slot.keys.begin / kKeys == (slot.keys.end - 1) / kKeys);
        }
        const Work w = slot.w;
        return_slot(barriers, work.index);  // now: it would wait for the stores
        work.next();
        float total[2];
        state.totals(total);
        store(w, factor, total, -1);
      }
    } else {
      int old = -1;                        // slot of the unit that is still to be stored
      int rows = -1, stored = -1;          // its Q buffer; the one that the last store went through
      bool product = false, fresh = true;  // it has keys; no product is in its O yet
      while (true) {
        const Slot& slot = take_work(barriers, work);
        if (old < 0 && !slot.valid) break;
        const bool some = slot.valid && slot.keys.begin < slot.keys.end;
        const int rows_of_unit = q_ring.index;
        RowState next;
        float total[2], weight[2];
        if (some && product) {
          joined_scores(s, slot, fresh, next, factor, origin, keep, total, weight);
        } else {
          if (some)
            first_scores(s, slot, next, factor, origin, keep);
          else if (product)
            last_output(fresh);
          state.totals(total);
        }
        bool to_do = some;  // the exponentials
        if (old >= 0) {
          const Work& w = barriers.slots[old].w;
          if (kStoreAmongExponents && some && product && leaves_by_tma(w, rows)) {
            // What there is to multiply, to round and to send is done between the exponentials.
            if (p.lse || p.sinks) finish(w, factor, total, weight);
            state = next;
            state.template exponents<2>(s, factor, origin, keep, [&](int i) {
              constexpr int kEach = kD / 64;
              if (i < 4) {
#pragma unroll
                for (int j = kEach * i; j < kEach * i + kEach; ++j) stage_rows(j, rows, weight);
              }
              if (i == 5) send_rows(w, rows, stored);
            });
            return_slot(barriers, old);
            to_do = false;
          } else {
            return_rows(stored);
            const Work copy = w;
            return_slot(barriers, old);  // now: it would wait for the stores
            store(copy, factor, total, rows);
          }
          stored = rows;
          rows = -1;
        }
        old = -1;
        product = some;
        if (!slot.valid) continue;
        old = work.index;
        work.next();
        if (!some) {
          state = next;
          return_rows(stored);
          continue;
        }
        if (to_do) {
          state = next;
          state.template exponents<2>(s, factor, origin, keep);
        }
        rows = rows_of_unit;
        pack(s);
        if (kBuffersQ == 2) return_rows(stored);  // with more there is time until the next store
        attend(s, slot, factor);
        fresh = slot.keys.begin / kKeys == (slot.keys.end - 1) / kKeys;
      }
      ptx::tma_store_wait();  // the last output has left shared memory before the CTA ends
    }
  }
};

}  // namespace fastinfer::cuda::flash
