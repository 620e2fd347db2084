// Hopper kernel (sm_90a): TMA, wgmma, warp-specialised and persistent.
//
// One CTA per SM: a producer warpgroup and kGroups consumer warpgroups of 64 query rows each. Warp
// 1 of the producer deals out tiles of work, warps 0 and 2 load Q and stream K and V tiles of kKeys
// keys through two rings of kStages buffers; the consumers hold S, P and O in registers.
//
//   S_j = Q K_j^T          runs together with   O += P_{j-1} V_{j-1}
//   softmax of S_j         runs under that product and, since the consumer groups take turns at
//                          issuing (named barriers), under the other group's products
//
// Keys go from the last visible tile to the first: masks come first and last, the tiles between
// need none. Tiles in shared memory are slabs of 64 columns, 128-byte swizzled, as TMA writes and
// wgmma reads them. Columns past head_dim are zeros from TMA. V rows that no row of the tile sees
// are overwritten with zeros before use (0 * NaN), K rows only give scores that are masked.
#pragma once

#include "../common/launch.cuh"
#include "flash_sm90_load.cuh"
#include "tensor_map.h"

namespace fastinfer::cuda::flash {

template <class T, int kD, bool kModify>
struct Consumer {
  using Tile = Sm90Tile<kD>;
  static constexpr int kKeys = Tile::kKeys, kStages = Tile::kStages;

  const FlashAttentionParams& p;
  Sm90Barriers<Tile>& barriers;
  const uint32_t q_tile, k_tiles, v_tiles;
  const int group;  // which consumer group this is

  float out[kD / 2];
  uint32_t probabilities[kKeys / 4];
  RowState state;
  Ring<kStages> k_ring;
  Ring<Tile::kStagesV> v_ring;
  Ring<Tile::kStagesQ> q_ring;

  static __device__ __forceinline__ void release(uint64_t* barrier) {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier);
  }

  __device__ __forceinline__ void release_queries() {
    release(&barriers.q_empty[q_ring.index][group]);
    q_ring.next();
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
      const Range low = row_limits(p, w, row), high = row_limits(p, w, row + 8);
      mask_scores(s, column, low.begin, low.end, high.begin, high.end);
    }
  }
  // Tiles all of whose keys are seen by all rows of the group of 64 that starts at `top`.
  __device__ __forceinline__ Range open_tiles(const Work& w, int32_t top) const {
    return {(max(row_limits(p, w, top + 63).begin, 0) + kKeys - 1) / kKeys,
            max(row_limits(p, w, top).end, 0) / kKeys};
  }

  // Zeros in the rows of the current V tile that no row of the work sees. All consumers.
  __device__ __forceinline__ void clean_values(Range keys, int32_t tile) {
    const int32_t first = tile * kKeys;
    if (first >= keys.begin && first + kKeys <= keys.end) return;
    const uint32_t v = v_tiles + v_ring.index * Tile::kTileBytes;
    const int thread = threadIdx.x - 128;
    for (int i = thread; i < kKeys * kD / 8; i += 128 * Tile::kGroups) {
      const int32_t key = first + i / 8 % kKeys;
      if (key < keys.begin || key >= keys.end)
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(v + i * 16), "r"(0)
                     : "memory");
    }
    ptx::proxy_fence_shared();
    ptx::named_sync(kCleanBarrier, 128 * Tile::kGroups);
  }
  static constexpr uint32_t kTurnBarrier = 1, kCleanBarrier = 1 + Tile::kGroups;

  __device__ __forceinline__ void wait_turn() { ptx::named_sync(kTurnBarrier + group, 256); }
  __device__ __forceinline__ void pass_turn() {
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

  // S of `tile` and O += P V of the tile before it (in order of work), then P of `tile`.
  template <bool kMask>
  __device__ __forceinline__ void step(float (&s)[kKeys / 2], const Work& w, int32_t tile,
                                       int32_t first, bool fresh, int32_t row, float factor) {
    const uint32_t v = v_tile();
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
    release(&barriers.k_empty[k_ring.index]);
    k_ring.next();
    if (tile == first) release_queries();
    treat<kMask>(s, w, tile, row);
    float origin[2], keep[2];
    state.template raise<2>(s, factor, origin, keep);
    pin(keep[0] + keep[1]);
    // The products are done by now: exponentials, whose unit is the slowest, and everything else
    // that is left share the time.
    ptx::wgmma_wait<0>();
    ptx::hold(out);
    ptx::hold(probabilities);
    release(&barriers.v_empty[v_ring.index]);
    v_ring.next();
    state.template exponents<2>(s, factor, origin, keep);
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) out[i] *= keep[i % 4 / 2];
    pack(s);
  }

  // All tiles of keys for one tile of rows.
  __device__ __forceinline__ void attend(const Slot& slot, int32_t top, int32_t row, float factor) {
    const int32_t first = slot.keys.begin / kKeys, last = (slot.keys.end - 1) / kKeys;
    state = RowState{};
    float origin[2], keep[2];
    float s[kKeys / 2];
    ptx::mbarrier_wait(&barriers.q_full[q_ring.index][group], q_ring.phase);
    ptx::mbarrier_wait(&barriers.k_full[k_ring.index], k_ring.phase);
    ptx::wgmma_fence();
    start_scores(s);
    ptx::wgmma_wait<0>();
    ptx::hold(s);
    release(&barriers.k_empty[k_ring.index]);
    k_ring.next();
    if (last == first) release_queries();
    treat<true>(s, slot.w, last, row);
    state.template raise<2>(s, factor, origin, keep);
    state.template exponents<2>(s, factor, origin, keep);
    pack(s);
    ptx::mbarrier_wait(&barriers.v_full[v_ring.index], v_ring.phase);
    clean_values(slot.keys, last);

    int32_t tile = last - 1;
    if constexpr (kD > 192) {
      // One body, masked: registers are short, and the products long enough to hide the mask.
      for (; tile >= first; --tile)
        step<true>(s, slot.w, tile, first, tile == last - 1, row, factor);
    } else {
      // Masked tiles at the right, open tiles, masked tiles at the left. Two bodies: with a branch
      // around the mask in a single one, the assembler waits for O before the softmax.
      const Range open = open_tiles(slot.w, top);
#pragma unroll 1
      for (int side = 0; side < 2; ++side) {
        for (const int32_t stop = side ? first : max(first, open.end); tile >= stop; --tile)
          step<true>(s, slot.w, tile, first, tile == last - 1, row, factor);
        for (const int32_t stop = max(first, open.begin); tile >= stop; --tile)
          step<false>(s, slot.w, tile, first, tile == last - 1, row, factor);
      }
    }
    ptx::mbarrier_wait(&barriers.v_full[v_ring.index], v_ring.phase);
    if (first < last) clean_values(slot.keys, first);
    ptx::wgmma_fence();
    start_output(v_tile(), first == last);
    ptx::wgmma_wait<0>();
    ptx::hold(out);
    ptx::hold(probabilities);
    release(&barriers.v_empty[v_ring.index]);
    v_ring.next();
  }

  __device__ __forceinline__ void run(bool packed_out) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const float factor = kModify ? 1.0f : p.scale * kLog2e;
    Ring<kSlots> work;
    if (group == Tile::kGroups - 1) pass_turn();  // the first group goes first
    while (true) {
      const Slot& slot = take_work(barriers, work);
      if (!slot.valid) break;
      const Work& w = slot.w;
      const int32_t top = w.row + 64 * group, row = top + 16 * warp + lane / 4;
      const bool some = slot.keys.begin < slot.keys.end;
      if (some) {
        attend(slot, top, row, factor);
      } else {
        state = RowState{};  // whose finish() gives weight 0: `out` is not looked at
      }
      const int64_t batch = p.cu_q ? 0 : w.batch, start = w.start_q, head = w.head;
      const float sink = sink_logit(p, w.head);
      float weight[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float lse;
        weight[r] = state.finish(r, factor, p, sink, lse);
        if (p.lse && lane % 4 == 0 && row + 8 * r < w.len_q)
          p.lse[batch * p.lse_batch + head * p.lse_head + (start + row + 8 * r) * p.lse_token] =
              lse;
      }
      T* const to =
          static_cast<T*>(p.out) + batch * p.out_batch + head * p.out_head + start * p.out_token;
      store_rows<T, kD>(to, p.out_token, p.head_dim, packed_out, out, row, row + 8, w.len_q,
                        weight[0], weight[1]);
      return_work(barriers, work);
    }
  }
};

template <class T, int kD, bool kModify>
__global__ void __launch_bounds__(Sm90Tile<kD>::kThreads, 1)
    flash_sm90_kernel(const __grid_constant__ FlashAttentionParams p,
                      const __grid_constant__ CUtensorMap q_map,
                      const __grid_constant__ CUtensorMap k_map,
                      const __grid_constant__ CUtensorMap v_map, const int64_t total,
                      const bool packed_out) {
  using Tile = Sm90Tile<kD>;
  constexpr int kStages = Tile::kStages, kConsumerWarps = 4 * Tile::kGroups;
  extern __shared__ char raw[];
  const uint32_t base = (ptx::shared_address(raw) + 1023) & ~1023u;
  const uint32_t q_tile = base, k_tiles = q_tile + Tile::kStagesQ * Tile::kQBytes;
  const uint32_t v_tiles = k_tiles + kStages * Tile::kTileBytes;
  auto& barriers = *reinterpret_cast<Sm90Barriers<Tile>*>(
      raw + (v_tiles + Tile::kStagesV * Tile::kTileBytes - ptx::shared_address(raw)));
  static_assert(sizeof(Sm90Barriers<Tile>) <= 512, "reserved in kSharedBytes");

  if (threadIdx.x == 0) {
    ptx::tma_prefetch(&q_map);
    ptx::tma_prefetch(&k_map);
    ptx::tma_prefetch(&v_map);
    for (int i = 0; i < Tile::kStagesQ; ++i)
      for (int g = 0; g < Tile::kGroups; ++g) {
        ptx::mbarrier_init(&barriers.q_full[i][g], 1);
        ptx::mbarrier_init(&barriers.q_empty[i][g], 4);
      }
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(&barriers.k_full[i], 1);
      ptx::mbarrier_init(&barriers.k_empty[i], kConsumerWarps);
    }
    for (int i = 0; i < Tile::kStagesV; ++i) {
      ptx::mbarrier_init(&barriers.v_full[i], 1);
      ptx::mbarrier_init(&barriers.v_empty[i], kConsumerWarps);
    }
    for (int i = 0; i < kSlots; ++i) {
      ptx::mbarrier_init(&barriers.slot_full[i], 1);
      ptx::mbarrier_init(&barriers.slot_empty[i], kConsumerWarps + 2);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  grid_wait();
  grid_launch_dependents();

  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    ptx::registers_give<Tile::kProducerRegisters>();
    const int warp = threadIdx.x / 32;
    if (warp == 0)
      load_queries_and_keys<kD>(p, &q_map, &k_map, barriers, q_tile, k_tiles);
    else if (warp == 1)
      deal_work(p, barriers, total);
    else if (warp == 2)
      load_values<kD>(p, &v_map, barriers, v_tiles);
  } else {
    ptx::registers_take<Tile::kConsumerRegisters>();
    Consumer<T, kD, kModify> consumer{p, barriers, q_tile, k_tiles, v_tiles, warpgroup - 1};
    consumer.run(packed_out);
  }
}

template <class T, int kD, bool kModify>
int launch_sm90(const FlashAttentionParams& call, void* stream) {
  using Tile = Sm90Tile<kD>;
  FlashAttentionParams p = call;
  p.box_rows = p.table ? box_rows(p.page_size, Tile::kKeys) : Tile::kKeys;
  CUtensorMap q, k, v;
  const int64_t rows_q = p.cu_q ? p.tokens_q : p.len_q;
  const int64_t rows_k = p.table ? p.page_size : p.cu_q ? p.tokens_k : p.len_k;
  const int64_t outer = p.table ? p.num_pages : p.cu_q ? 1 : p.batch;
  int error = tensor_map(q, p.q, p.dtype, p.head_dim, rows_q, p.heads_q, p.cu_q ? 1 : p.batch,
                         p.q_token, p.q_head, p.q_batch, 64);
  if (!error)
    error = tensor_map(k, p.k.data, p.dtype, p.head_dim, rows_k, p.heads_kv, outer, p.k.token,
                       p.k.head, p.k.page, p.box_rows);
  if (!error)
    error = tensor_map(v, p.v.data, p.dtype, p.head_dim, rows_k, p.heads_kv, outer, p.v.token,
                       p.v.head, p.v.page, p.box_rows);
  if (error) return error;
  const int64_t tiles = p.cu_q ? p.tokens_q / Tile::kRows + p.batch
                               : ceil_div(p.len_q, Tile::kRows) * int64_t{p.batch};
  const int64_t total = tiles * p.heads_q;
  if (total > kMaxTiles) return cudaErrorInvalidConfiguration;
  const int64_t ctas = total < device_facts().sms ? total : device_facts().sms;
  return launch(flash_sm90_kernel<T, kD, kModify>, dim3(static_cast<unsigned>(ctas)),
                dim3(Tile::kThreads), Tile::kSharedBytes, stream, p, q, k, v, total,
                aligned16(p.out, {p.out_batch, p.out_token, p.out_head}));
}

}  // namespace fastinfer::cuda::flash
