// The consumer warpgroups where registers suffice for two tiles of scores (head dimensions up to
// 64): the products of a tile run under the softmax of the tile before it.
//
//   O += P_{j-1} V_{j-1}   then   S_{j+1} = Q K_{j+1}^T     issued together; under them
//   softmax of S_j         the maximum at once, the rest when O is there
//
// At 64 columns a softmax takes three times as long as the products, and a group that waits for its
// products before it looks for the maximum leaves both units idle in turns. Order and rounding are
// those of Consumer::step: the same bits. Tiles of all units of work form one sequence; the output
// of a unit is stored under the first products of the next.
#pragma once

#include "flash_sm90_consume.cuh"

namespace fastinfer::cuda::flash {

template <class T, class Tile>
struct TwinConsumer : Consumer<T, Tile, false> {
  using Base = Consumer<T, Tile, false>;
  using Base::barriers, Base::group, Base::k_ring, Base::kKeys, Base::out, Base::p,
      Base::probabilities, Base::q_ring, Base::state, Base::v_ring;

  struct Place {
    int slot;  // -1: no more work
    int32_t tile;
    bool opens;  // the unit's first tile in order of work
    int rows;    // Q buffer of the unit
  };
  Ring<Tile::kSlots> work;
  Place stored_next{-1};  // the unit that is still to be stored
  bool product = false;   // P is that of a tile
  bool fresh = true;      // no product is in O yet

  // Zeros for rows that see no key.
  __device__ __forceinline__ void store_nothing(const Work& w) {
    const int64_t batch = p.cu_q ? 0 : w.batch, start = w.start_q, head = w.head;
    T* const to =
        static_cast<T*>(p.out) + batch * p.out_batch + head * p.out_head + start * p.out_token;
    for (int i = threadIdx.x % 128; i < 64 * p.head_dim; i += 128) {
      const int32_t row = w.row + 64 * group + i / p.head_dim, column = i % p.head_dim;
      if (row >= w.len_q) return;
      to[row * p.out_token + column] = from_float<T>(0.0f);
      if (p.lse && column == 0)
        p.lse[batch * p.lse_batch + head * p.lse_head + (start + row) * p.lse_token] = -INFINITY;
    }
  }
  // The first tile of the next unit that has keys.
  __device__ __forceinline__ Place open_unit() {
    while (true) {
      const Slot& slot = take_work(barriers, work);
      if (!slot.valid) return {-1, 0, false, 0};
      const int index = work.index;
      work.next();
      if (slot.keys.begin < slot.keys.end)
        return {index, (slot.keys.end - 1) / kKeys, true, q_ring.index};
      store_nothing(slot.w);
      return_slot(barriers, index);
    }
  }
  __device__ __forceinline__ bool closes(const Place& at) const {
    return at.tile == barriers.slots[at.slot].keys.begin / kKeys;
  }
  __device__ __forceinline__ Place after(const Place& at) {
    if (closes(at)) return open_unit();
    return {at.slot, at.tile - 1, false, at.rows};
  }

  __device__ __forceinline__ void wait_for_keys(const Place& at) {
    if (at.slot < 0) return;
    if (at.opens) ptx::mbarrier_wait(&barriers.q_full[q_ring.index][group], q_ring.phase);
    ptx::mbarrier_wait(&barriers.k_full[k_ring.index], k_ring.phase);
  }
  __device__ __forceinline__ void scores_there(const Place& at) {
    if (at.slot >= 0) this->scores_done(closes(at));
  }

  // P of the tile at `now` from its scores, under the product of the tile before and the scores of
  // the tile behind. Both are always issued, as a branch around them would serialise them: before
  // the first tile with P = 0 into an O that is not used, after the last one on buffers that are
  // not written any more into an S that is not used.
  __device__ __forceinline__ void step(float (&s)[kKeys / 2], float (&other)[kKeys / 2],
                                       const Place& now, const Place& behind, float factor) {
    const uint32_t v = this->v_tile();
    ptx::mbarrier_wait(&barriers.v_full[v_ring.index], v_ring.phase);
    wait_for_keys(behind);
    ptx::wgmma_fence();
    this->start_output(v, fresh);
    this->start_scores(other);

    const Slot& slot = barriers.slots[now.slot];
    RowState next = state;
    if (now.opens) next = RowState{};
    const Range open = slot.open[group];
    if (now.tile < open.begin || now.tile >= open.end)
      this->template treat<true>(s, slot.w, now.tile, this->first_row(slot.w));
    float origin[2], keep[2];
    next.template raise<2>(s, factor, origin, keep);
    this->pin(origin[0] + origin[1] + keep[0] + keep[1]);

    ptx::wgmma_wait<1>();
    ptx::hold(out);
    ptx::hold(probabilities);
    if (product) this->output_done();
    product = true;
    int stored = -1;
    if (now.opens) {
      if (stored_next.slot >= 0) {
        store_unit();
        stored = stored_next.rows;
      }
      stored_next = now;
    }
    state = next;
    fresh = now.opens;
    state.template exponents<2>(s, factor, origin, keep);
#pragma unroll
    for (int i = 0; i < Tile::kDim / 2; ++i) out[i] *= keep[i % 4 / 2];
    this->pack(s);
    this->return_rows(stored);
    this->clean_values(slot.keys, now.tile);
    ptx::wgmma_wait<0>();
    ptx::hold(other);
    scores_there(behind);
  }
  __device__ __forceinline__ void store_unit() {
    const Work w = barriers.slots[stored_next.slot].w;
    return_slot(barriers, stored_next.slot);  // now: it would wait for the stores
    // Nobody reads Q any more: the output may take its place.
    ptx::named_sync(Base::kStoreBarrier + group, 128);
    this->store(w, p.scale * kLog2e, stored_next.rows);
  }

  __device__ __forceinline__ void run() {
    const float factor = p.scale * kLog2e;
    float a[kKeys / 2], b[kKeys / 2];
    Place now = open_unit();
    if (now.slot < 0) return;
    wait_for_keys(now);
    ptx::wgmma_fence();
    this->start_scores(a);
    ptx::wgmma_wait<0>();
    ptx::hold(a);
    scores_there(now);
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) probabilities[i] = 0;
#pragma unroll 1
    while (true) {
      const Place behind = after(now);
      step(a, b, now, behind, factor);
      if (behind.slot < 0) break;
      now = after(behind);
      step(b, a, behind, now, factor);
      if (now.slot < 0) break;
    }
    this->last_output(fresh);
    store_unit();
    ptx::tma_store_wait();  // the last output has left shared memory before the CTA ends
  }
};

}  // namespace fastinfer::cuda::flash
