// The output of the sm_90a kernel's consumer groups: through a buffer of Q by TMA where that is
// possible, else by plain stores.
#pragma once

#include "flash_sm90_tile.cuh"

namespace fastinfer::cuda::flash {

// O of a group's 64 rows, in the accumulator layout, and what is known of those rows.
template <class T, class Tile>
struct OutputRows {
  static constexpr int kD = Tile::kDim;

  const FlashAttentionParams& p;
  Sm90Barriers<Tile>& barriers;
  const CUtensorMap& out_map;
  const bool packed_out, tma_out;  // `out` suits 16-byte stores, suits TMA
  const uint32_t q_tile;
  const int group;  // which consumer group this is

  float out[kD / 2];
  RowState state;

  __device__ __forceinline__ OutputRows(const FlashAttentionParams& p, Sm90Barriers<Tile>& barriers,
                                        const CUtensorMap& out_map, bool packed_out, bool tma_out,
                                        uint32_t q_tile, int group)
      : p(p),
        barriers(barriers),
        out_map(out_map),
        packed_out(packed_out),
        tma_out(tma_out),
        q_tile(q_tile),
        group(group) {}

  // Columns [16 j, 16 j + 16) of the group's 64 rows of output to shared memory, in slabs as TMA
  // wants them, in place of the rows of Q.
  __device__ __forceinline__ void stage_rows(int j, int rows, const float (&weight)[2]) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
    const uint32_t at = q_tile + rows * Tile::kQBytes + group * 64 * 128 + row * 128 +
                        ((lane / 16 ^ lane % 8) << 4);
    const auto word = [&](int i, float by) {
      return by == 0.0f ? 0u : pack2<T>(out[i] * by, out[i + 1] * by);
    };
    ptx::store_matrices((at ^ 2 * j % 8 << 4) + j / 4 * Tile::kRows * 128, word(8 * j, weight[0]),
                        word(8 * j + 2, weight[1]), word(8 * j + 4, weight[0]),
                        word(8 * j + 6, weight[1]));
  }
  // The warp's part of the Q buffer `rows` back to the loader, once the output has left it.
  __device__ __forceinline__ void return_rows(int& rows) {
    if (rows >= 0 && threadIdx.x % 32 == 0) {
      ptx::tma_store_wait_read();
      ptx::mbarrier_arrive(&barriers.q_empty[rows][group]);
    }
    rows = -1;
  }

  // This thread's first row of a unit of work; the second is 8 further.
  __device__ __forceinline__ int32_t first_row(const Work& w) const {
    return w.row + 64 * group + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
  }
  // What the output is multiplied by where there are no sinks.
  static __device__ __forceinline__ void plain_weights(const float (&total)[2],
                                                       float (&weight)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) weight[r] = total[r] == 0.0f ? 0.0f : __fdividef(1.0f, total[r]);
  }
  // The same in general; stores the LSE. `total`: sums of the two rows.
  __device__ __forceinline__ void finish(const Work& w, float factor, const float (&total)[2],
                                         float (&weight)[2]) {
    plain_weights(total, weight);
    if (!p.lse && !p.sinks) return;
    const int64_t batch = p.cu_q ? 0 : w.batch, start = w.start_q, head = w.head;
    const int32_t row = first_row(w);
    const float sink = sink_logit(p, w.head);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float lse;
      weight[r] = state.finish(r, total[r], factor, p, sink, lse);
      if (p.lse && threadIdx.x % 4 == 0 && row + 8 * r < w.len_q)
        p.lse[batch * p.lse_batch + head * p.lse_head + (start + row + 8 * r) * p.lse_token] = lse;
    }
  }
  // Whether the output leaves by TMA, through the Q buffer `rows` of the unit (-1: has none).
  __device__ __forceinline__ bool leaves_by_tma(const Work& w, int rows) const {
    return rows >= 0 && tma_out && (!p.cu_q || w.row + 64 * group + 64 <= w.len_q);
  }
  // Sends the 16 rows that the warp has staged. `stored`: what return_rows() is still to do for.
  __device__ __forceinline__ void send_rows(const Work& w, int rows, int stored) {
    ptx::proxy_fence_shared();
    __syncwarp();
    if (threadIdx.x % 32 != 0) return;
    return_rows(stored);
    const int32_t row = 64 * group + threadIdx.x / 32 % 4 * 16;
#pragma unroll
    for (int i = 0; i < Tile::kSlabs; ++i)
      ptx::tma_store(&out_map, q_tile + rows * Tile::kQBytes + (i * Tile::kRows + row) * 128,
                     64 * i, w.start_q + w.row + row, w.head, p.cu_q ? 0 : w.batch);
    ptx::tma_store_commit();
  }
  __device__ __forceinline__ void store(const Work& w, float factor, const float (&total)[2],
                                        int rows) {
    float weight[2];
    finish(w, factor, total, weight);
    if (leaves_by_tma(w, rows)) {
#pragma unroll
      for (int j = 0; j < kD / 16; ++j) stage_rows(j, rows, weight);
      send_rows(w, rows, -1);
      return;
    }
    const int64_t batch = p.cu_q ? 0 : w.batch, start = w.start_q, head = w.head;
    const int32_t row = first_row(w);
    T* const to =
        static_cast<T*>(p.out) + batch * p.out_batch + head * p.out_head + start * p.out_token;
    store_rows<T, kD>(to, p.out_token, p.head_dim, packed_out, out, row, row + 8, w.len_q,
                      weight[0], weight[1]);
  }
};

}  // namespace fastinfer::cuda::flash
