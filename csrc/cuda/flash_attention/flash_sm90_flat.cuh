// The consumer warpgroups for head dimensions up to 64: the tiles of all units of work form one
// sequence, and one copy of the code does a step of it, whatever unit it belongs to.
//
// At 64 columns a step takes as long as 30 cold instructions per softmax row... (see run)
#pragma once

#include "flash_sm90_consume.cuh"

namespace fastinfer::cuda::flash {

template <class T, class Tile>
struct FlatConsumer : Consumer<T, Tile, false> {
  using Base = Consumer<T, Tile, false>;
  using Base::barriers, Base::group, Base::k_ring, Base::kKeys, Base::out, Base::p,
      Base::probabilities, Base::q_ring, Base::state, Base::v_ring;

  Ring<Tile::kSlots> work;
  int slot = -1;        // of the unit at work; -1: no more
  int32_t tile, first;  // the tile at work, the last one of the unit in order of work
  Range keys, open;
  int rows;  // its Q buffer

  // Zeros for rows that see no key.
  __device__ __forceinline__ void store_nothing(const Work& w) {
    const int64_t batch = p.cu_q ? 0 : w.batch, start = w.start_q, head = w.head;
    T* const to =
        static_cast<T*>(p.out) + batch * p.out_batch + head * p.out_head + start * p.out_token;
#pragma unroll 1
    for (int i = threadIdx.x % 128; i < 64 * p.head_dim; i += 128) {
      const int32_t row = w.row + 64 * group + i / p.head_dim, column = i % p.head_dim;
      if (row >= w.len_q) return;
      to[row * p.out_token + column] = from_float<T>(0.0f);
      if (p.lse && column == 0)
        p.lse[batch * p.lse_batch + head * p.lse_head + (start + row) * p.lse_token] = -INFINITY;
    }
  }
  // The next unit that has keys.
  __device__ __forceinline__ void open_unit() {
    while (true) {
      const Slot& next = take_work(barriers, work);
      slot = next.valid ? work.index : -1;
      if (slot < 0) return;
      work.next();
      keys = next.keys;
      open = next.open[group];
      if (keys.begin < keys.end) break;
      store_nothing(next.w);
      return_slot(barriers, slot);
    }
    first = keys.begin / kKeys;
    tile = (keys.end - 1) / kKeys;
    rows = q_ring.index;
  }

  __device__ __forceinline__ void run() {
    const float factor = p.scale * kLog2e;
    float s[kKeys / 2], origin[2], keep[2], total[2];
    if (group == 1) this->pass_turn();  // the first group goes first
    open_unit();
    if (slot < 0) return;
    int old = -1, old_rows = -1, stored = -1;  // unit to be stored, its Q buffer; the one before
    bool opens = true, product = false, fresh = true;
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) probabilities[i] = 0;
#pragma unroll
    for (int i = 0; i < Tile::kDim / 2; ++i) out[i] = 0.0f;
#pragma unroll 1
    while (true) {
      const uint32_t v = this->v_tile();
      if (opens) ptx::mbarrier_wait(&barriers.q_full[q_ring.index][group], q_ring.phase);
      this->both_products(s, v, fresh);
      this->scores_done(tile == first);
      if (tile < open.begin || tile >= open.end) {
        const Work& w = barriers.slots[slot].w;
        this->template treat<true>(s, w, tile, this->first_row(w));
      }
      RowState next = state;
      if (opens) next = RowState{};
      next.template raise<2>(s, factor, origin, keep);
      this->pin(origin[0] + origin[1] + keep[0] + keep[1]);
      // Not before the first tile of all, whose product was one with zeros.
      ptx::wgmma_wait<0>();
      ptx::hold(out);
      ptx::hold(probabilities);
      if (product) this->output_done();
      product = true;
      if (opens) {
        if (old >= 0) {
          state.totals(total);
          const Work& w = barriers.slots[old].w;
          if (this->leaves_by_tma(w, old_rows)) {
            float weight[2];
            this->finish(w, factor, total, weight);
#pragma unroll
            for (int j = 0; j < Tile::kDim / 16; ++j) this->stage_rows(j, old_rows, weight);
            this->send_rows(w, old_rows, stored);
            return_slot(barriers, old);
          } else {
            this->return_rows(stored);
            const Work copy = w;
            return_slot(barriers, old);  // now: it would wait for the stores
            this->store(copy, factor, total, old_rows);
          }
          stored = old_rows;
        }
        old = slot;
        old_rows = rows;
      }
      state = next;
      fresh = opens;
      state.template exponents<2>(s, factor, origin, keep);
#pragma unroll
      for (int i = 0; i < Tile::kDim / 2; ++i) out[i] *= keep[i % 4 / 2];
      this->pack(s);
      this->clean_values(keys, tile);
      opens = tile == first;
      --tile;
      if (opens) {
        open_unit();
        if (slot < 0) break;
      }
    }
    this->last_output(fresh);
    state.totals(total);
    const Work w = barriers.slots[old].w;
    this->store(w, factor, total, old_rows);
    ptx::tma_store_wait();  // the last output has left shared memory before the CTA ends
  }
};

}  // namespace fastinfer::cuda::flash
