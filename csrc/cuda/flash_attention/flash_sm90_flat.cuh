// The consumer warpgroups for head dimensions up to 64: the tiles of all units of work form one
// sequence, and one copy of the code does every step of it.
//
//   S_j = Q K_j^T   together with   O += P_{j-1} V_{j-1}     the products of a step
//   softmax of S_j                                           the rest of it
//
// whether tile j - 1 belongs to the same unit of work or to the one before; that one's output is
// then stored between the maximum and the exponentials. At 64 columns a unit of four tiles takes
// 5 us, and what runs once per unit runs from a cold instruction cache, at about four clocks per
// instruction: the less code there is, the better. Order and rounding are those of Consumer::step:
// the same bits.
#pragma once

#include "flash_sm90_consume.cuh"

namespace fastinfer::cuda::flash {

template <class T, class Tile>
struct FlatConsumer : Consumer<T, Tile, false> {
  using Base = Consumer<T, Tile, false>;
  using Base::barriers, Base::group, Base::kKeys, Base::out, Base::p, Base::probabilities,
      Base::q_ring, Base::state, Base::v_ring;
  using Base::Base;

  Ring<Tile::kSlots> work;
  int slot = -1;        // of the unit at work; -1: there is no more
  int rows;             // its Q buffer
  int32_t tile, first;  // the tile at work and the unit's last one in order of work
  Range keys, open;     // of the unit; tiles without a mask

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
      this->store_nothing(next.w);
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
    int old = -1, old_rows = -1;  // slot and Q buffer of the unit that is still to be stored
    int stored = -1;              // the Q buffer of the one before that
    // The very first step has no tile before it: its second product is one with zeros, into an O
    // that the next step overwrites. A branch around it would serialise the products.
    bool product = false;
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) probabilities[i] = 0;
#pragma unroll
    for (int i = 0; i < Tile::kDim / 2; ++i) out[i] = 0.0f;
    bool opens = true, fresh = true;  // tile j, tile j - 1 is the first one of a unit
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
      if (!opens) continue;
      open_unit();
      if (slot < 0) break;
    }
    this->last_output(fresh);
    state.totals(total);
    const Work w = barriers.slots[old].w;
    this->store(w, factor, total, old_rows);
    ptx::tma_store_wait();  // the last output has left shared memory before the CTA ends
  }
};

}  // namespace fastinfer::cuda::flash
