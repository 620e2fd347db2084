// CUDA launches of flash_attn_kvcache: workspace, choice of kernel, parameters.
//
// Workspace: 64 KiB of counters, zeroed once by the caller and left zero by every launch, then the
// partial results of split items, which need no clearing.
#include "paged_attention.h"

#include <algorithm>
#include <limits>

#ifdef FASTINFER_WITH_CUDA
#include "../cuda/common/launch.h"
#include "../cuda/paged_attention/paged_attention.h"
#include "cuda_shim.h"
#endif

namespace fastinfer::paged_attention {

// Teams of 1, 2 or 4 warps. Invariant: always 1, because the team decides which keys a warp adds
// up. Few keys (`capacity` of each of the `pairs` of sequence and head): 1 as well, they are read
// twice but by twice as many CTAs. More of them where no plain kernel has teams of 2
// (`plain_pairs`). Several queries per sequence over a 16-bit cache of D = 128 (`several`) have no
// plain kernel of either kind: teams of 2.
RowBlocks choose_row_blocks(int64_t rows, int64_t pairs, int64_t capacity, bool plain_pairs,
                            bool several, bool batch_invariant) {
  if (several && !batch_invariant && rows > 16 && rows <= 32) return {2, 1};
  const bool few = plain_pairs && rows <= 32 ? pairs * std::min<int64_t>(capacity, 1 << 20) <= 32768
                                             : pairs <= (rows <= 32 ? 128 : 8);
  const int64_t tiles = batch_invariant || rows <= 16 || (few && rows <= 64) ? 1
                        : rows <= 32                                         ? 2
                                                                             : 4;
  return {tiles, (rows + 16 * tiles - 1) / (16 * tiles)};
}

// As many as possible, so that CTAs that run together read neighbouring heads, as long as few CTAs
// are left over.
int64_t choose_lanes(int64_t pairs, int64_t ctas) {
  for (int64_t lanes = std::min(pairs, ctas); lanes > 1; --lanes)
    if (pairs % lanes == 0 && ctas / lanes * lanes * 100 >= ctas * 98) return lanes;
  return 1;
}

// Clusters of CTAs that have an item, (sequence, key head, row block), to themselves: its pieces
// then meet in shared memory. A launch of nothing but large ones where few keys fit into the table
// (more of them are read faster by all SMs), else clusters of two, which every SM has a place for,
// used where the lengths say that it pays. Measured: docs/kernels/paged_attention.md.
Clusters choose_clusters(int64_t batch, int64_t heads, int64_t row_blocks, int64_t capacity,
                         bool eight_bit, int64_t slots) {
  constexpr int64_t kAlways = std::numeric_limits<int32_t>::max();
  const int64_t pairs = heads * row_blocks, items = batch * pairs;
  const int64_t eights = (slots - slots / 11) / 8;  // that run at once: GPCs have SMs left over
  if (batch > 32) return {1, 1, 0, 0};              // a warp looks at all lengths
  if (capacity <= 2048 && items <= eights) return {8, 1, 0, kAlways};
  if (eight_bit && capacity <= 8192 && items * 2 <= eights) return {8, 2, 0, kAlways};
  if (!eight_bit && capacity <= 6144 && items * 32 <= slots) return {2, 8, 0, kAlways};
  // Two row blocks read the same keys, which neighbours do at the same time, clusters or not.
  const bool many = items >= 24 || row_blocks == 2;
  const int64_t used = slots / pairs * pairs;
  if (many && pairs % 2 == 0 && items * 2 <= used && used * 100 >= slots * 96)
    return {2, 1, 1, eight_bit ? 4 : 8};
  return {1, 1, 0, 0};
}

// One CTA of 8 warps per SM instead of two of 4, for pairs of warps: half as many pieces of 17 to
// 32 rows are put together. Pays where that leaves few of an item, or gives every SM much to do.
bool choose_large(int64_t batch, int64_t heads, int64_t capacity) {
  const int64_t items = batch * heads;
  return capacity >= 2048 &&
         (items >= 32 || items * std::min<int64_t>(capacity, 1 << 20) >= 131072);
}

#ifdef FASTINFER_WITH_CUDA
namespace {

using cuda::DecodeParams;

constexpr int64_t kCounterBytes = 64 * 1024;

bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

const int32_t* int_data(const OptTensor& t) {
  return t ? static_cast<const int32_t*>(t->const_data_ptr()) : nullptr;
}

// Bytes between the first and the last element of a cache.
int64_t span_bytes(const Tensor& t) {
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  return last * static_cast<int64_t>(t.element_size());
}

// A check of drafts, say: measured at D = 128 only.
bool has_several_queries(const DecodeParams& p) {
  return p.q_len > 1 && !is_8bit(p.kv_dtype) && p.dim > 64 && p.dim <= 128;
}

DecodeParams decode_params(const attention::Call& call, const Tensors& t, int64_t capacity,
                           bool invariant) {
  const auto& s = call.p;
  DecodeParams p{};
  p.q = s.q, p.out = s.out, p.lse = s.lse;
  p.k = s.k.data, p.v = s.v.data;
  p.k_scale = s.k.scale, p.v_scale = s.v.scale;
  p.q_batch = t.q.stride(0), p.q_token = s.q_token, p.q_head = s.q_head;
  p.out_batch = t.out.stride(0), p.out_token = s.out_token, p.out_head = s.out_head;
  if (t.lse)
    p.lse_batch = t.lse->stride(0), p.lse_head = t.lse->stride(1), p.lse_token = t.lse->stride(2);
  p.k_page = s.k.page, p.k_token = s.k.token, p.k_head = s.k.head;
  p.v_page = s.v.page, p.v_token = s.v.token, p.v_head = s.v.head;
  p.ks_page = s.k.scale_page, p.ks_token = s.k.scale_token, p.ks_head = s.k.scale_head;
  p.vs_page = s.v.scale_page, p.vs_token = s.v.scale_token, p.vs_head = s.v.scale_head;
  p.scale_per_token_k = s.k.scale_per_token, p.scale_per_token_v = s.v.scale_per_token;
  p.lengths = int_data(t.cache_seqlens);
  p.cache_rows = int_data(t.cache_batch_idx);
  p.leftpad = int_data(t.cache_leftpad);
  p.table = int_data(t.block_table);
  p.plan = int_data(t.plan);
  p.lengths_stride = t.cache_seqlens ? t.cache_seqlens->stride(0) : 0;
  p.cache_rows_stride = t.cache_batch_idx ? t.cache_batch_idx->stride(0) : 0;
  p.leftpad_stride = t.cache_leftpad ? t.cache_leftpad->stride(0) : 0;
  p.table_stride = t.block_table ? t.block_table->stride(0) : 0;
  p.alibi = s.alibi, p.alibi_batch = s.alibi_batch, p.alibi_head = s.alibi_head;
  p.sinks = s.sinks, p.sinks_dtype = s.sinks_dtype, p.sinks_stride = s.sinks_stride;
  const auto narrow = [](int64_t x) {
    return static_cast<int32_t>(std::min<int64_t>(x, INT32_MAX / 2));
  };
  p.batch = narrow(t.q.size(0));
  p.q_len = narrow(t.q.size(1));
  p.append = t.k ? narrow(t.k->size(1)) : 0;
  p.capacity = narrow(capacity);
  p.heads_kv = narrow(s.heads_kv), p.group = narrow(s.group), p.dim = narrow(s.head_dim);
  p.page_size = t.block_table ? narrow(t.k_cache.size(1)) : 1;
  p.page_shift = -1;
  for (int shift = 0; shift < 31; ++shift)
    if (p.page_size == 1 << shift) p.page_shift = shift;
  p.columns = t.block_table ? narrow(t.block_table->size(1)) : 0;
  p.entries = INT32_MAX;
  if (t.block_table && aligned(p.table, 16) && (p.table_stride == p.columns || p.batch == 1))
    p.entries = narrow(int64_t{p.batch} * p.columns);
  constexpr int64_t kPrefetched = 1 << 20;
  if (t.q.is_contiguous() && t.q.numel() * 2 <= kPrefetched)
    p.q_bytes = static_cast<int32_t>(t.q.numel() * 2);
  p.query_packs = aligned(s.q, 16) && p.q_batch % 8 == 0 && s.q_token % 8 == 0 && s.q_head % 8 == 0;
  p.query_early = !cuda::programmatic_launch();
  p.q_dtype = s.dtype, p.kv_dtype = s.kv_dtype;
  p.rows = narrow(s.group * t.q.size(1));
  const bool plain_pairs = p.q_len == 1 && !is_8bit(s.kv_dtype) && s.head_dim <= 128;
  const RowBlocks blocks = choose_row_blocks(p.rows, t.q.size(0) * s.heads_kv, capacity,
                                             plain_pairs, has_several_queries(p), invariant);
  p.row_tiles = narrow(blocks.row_tiles), p.row_blocks = narrow(blocks.blocks);
  p.row_shift = p.row_tiles / 2;
  const auto window = [](int64_t w) { return w < int64_t{1} << 30 ? static_cast<int32_t>(w) : -1; };
  p.window_left = window(s.window_left), p.window_right = window(s.window_right);
  p.scale = s.scale, p.softcap = s.softcap;
  p.invariant = invariant;
  constexpr int64_t kPiece = cuda::kInvariantTiles * cuda::kPlanTile;
  p.max_pieces = narrow(std::max<int64_t>(1, (capacity + kPiece - 1) / kPiece));

  const int64_t size = dtype_size(s.kv_dtype);
  p.packs = s.k.page == s.v.page && s.k.token == s.v.token && s.k.head == s.v.head &&
            aligned(s.k.data, 16) && aligned(s.v.data, 16) && s.head_dim * size % 16 == 0 &&
            s.k.page * size % 16 == 0 && s.k.token * size % 16 == 0 && s.k.head * size % 16 == 0 &&
            span_bytes(t.k_cache) < int64_t{1} << 36;
  if (p.packs) {
    p.page16 = static_cast<uint32_t>(s.k.page * size / 16);
    p.token16 = static_cast<uint32_t>(s.k.token * size / 16);
    p.head16 = static_cast<uint32_t>(s.k.head * size / 16);
  }
  p.pages = t.k_cache.size(0), p.page_rows = t.k_cache.size(1);
  p.out_packs =
      aligned(s.out, 8) && p.out_batch % 4 == 0 && s.out_token % 4 == 0 && s.out_head % 4 == 0;
  return p;
}

cuda::AppendParams append_params(const attention::Call& call, const Tensors& t, void* q_out) {
  const auto& s = call.p;
  cuda::AppendParams a{};
  if (t.k) {
    a.k = t.k->const_data_ptr(), a.v = t.v->const_data_ptr();
    a.k_batch = t.k->stride(0), a.k_token = t.k->stride(1), a.k_head = t.k->stride(2);
    a.v_batch = t.v->stride(0), a.v_token = t.v->stride(1), a.v_head = t.v->stride(2);
    a.tokens = static_cast<int32_t>(t.k->size(1));
  }
  a.k_cache = const_cast<void*>(s.k.data), a.v_cache = const_cast<void*>(s.v.data);
  a.k_scale = const_cast<float*>(s.k.scale), a.v_scale = const_cast<float*>(s.v.scale);
  a.k_scale_per_token = s.k.scale_per_token, a.v_scale_per_token = s.v.scale_per_token;
  a.kc_page = s.k.page, a.kc_token = s.k.token, a.kc_head = s.k.head;
  a.vc_page = s.v.page, a.vc_token = s.v.token, a.vc_head = s.v.head;
  a.ks_page = s.k.scale_page, a.ks_token = s.k.scale_token, a.ks_head = s.k.scale_head;
  a.vs_page = s.v.scale_page, a.vs_token = s.v.scale_token, a.vs_head = s.v.scale_head;
  a.q = s.q, a.q_out = q_out;
  a.q_batch = t.q.stride(0), a.q_token = s.q_token, a.q_head = s.q_head;
  a.cos = s.rotary.cos, a.sin = s.rotary.sin, a.rotary_dtype = s.rotary.dtype;
  a.cos_stride = s.rotary.cos_stride, a.sin_stride = s.rotary.sin_stride;
  a.rotary_dim = static_cast<int32_t>(s.rotary.dim);
  a.interleaved = s.rotary.interleaved, a.q_per_token = s.rotary_per_token;
  a.lengths = int_data(t.cache_seqlens);
  a.lengths_stride = t.cache_seqlens ? t.cache_seqlens->stride(0) : 0;
  a.cache_rows = int_data(t.cache_batch_idx);
  a.cache_rows_stride = t.cache_batch_idx ? t.cache_batch_idx->stride(0) : 0;
  a.table = int_data(t.block_table);
  a.table_stride = t.block_table ? t.block_table->stride(0) : 0;
  a.page_size = static_cast<int32_t>(t.k_cache.size(1));
  a.batch = static_cast<int32_t>(t.q.size(0));
  a.heads_kv = static_cast<int32_t>(s.heads_kv), a.dim = static_cast<int32_t>(s.head_dim);
  a.q_len = static_cast<int32_t>(t.q.size(1)), a.heads_q = static_cast<int32_t>(s.heads_q);
  a.dtype = s.dtype, a.cache_dtype = s.kv_dtype;
  a.soft = cuda::force_portable();
  return a;
}

// Counters and partial results; `counters` and `partials` own the memory that is allocated here.
void place_workspace(const char* op, DecodeParams& p, int64_t slots, const Tensors& t,
                     OptTensor& counters, OptTensor& partials) {
  const int64_t items = int64_t{p.batch} * p.heads_kv * p.row_blocks;
  const int64_t rows = std::min<int64_t>(p.rows, 16 * p.row_tiles);
  const int64_t pieces = p.invariant ? items * p.max_pieces : 2 * slots;
  const int64_t num_counters = p.invariant ? items : slots;
  FI_CHECK(pieces <= INT32_MAX && num_counters <= INT32_MAX, op,
           ": batch, heads and cache capacity are too large for batch_invariant, got ", items,
           " items of up to ", p.max_pieces, " pieces; split the batch");
  const int64_t floats = pieces * rows * (p.dim + 2) + num_counters;
  char* counter_data = nullptr;
  float* partial_data = nullptr;
  const bool given = t.workspace && num_counters * 4 <= kCounterBytes;
  if (given) {
    const Tensor& w = *t.workspace;
    check_device(op, t.q, {{"workspace", &w}});
    const int64_t bytes = w.numel() * static_cast<int64_t>(w.element_size());
    FI_CHECK(
        w.is_contiguous() && aligned(w.const_data_ptr(), 16) && bytes >= kCounterBytes + floats * 4,
        op, ": workspace must be contiguous, aligned to 16 bytes and hold at least ",
        kCounterBytes + floats * 4, " bytes (zeroed once), got ", describe(w),
        "; leave it out to have one allocated");
    counter_data = static_cast<char*>(w.mutable_data_ptr());
    partial_data = reinterpret_cast<float*>(counter_data + kCounterBytes);
  } else {
    counters = torch::stable::new_zeros(t.q, {num_counters}, ScalarType::Int);
    partials = torch::stable::new_empty(t.q, {floats}, ScalarType::Float);
    counter_data = static_cast<char*>(counters->mutable_data_ptr());
    partial_data = static_cast<float*>(partials->mutable_data_ptr());
  }
  p.counters = reinterpret_cast<int32_t*>(counter_data);
  p.partial = partial_data;
  p.partial_ml = partial_data + pieces * rows * p.dim;
  p.claims = reinterpret_cast<int32_t*>(p.partial_ml + pieces * rows * 2);
}

int launch_attention(const DecodeParams& p, int slots, void* stream) {
#ifdef FASTINFER_HAVE_SM90A
  if (cuda::boxes_serve(p)) return cuda::launch_decode_boxes(p, slots, stream);
#endif
  if (p.kv_dtype == DType::bf16) return cuda::launch_decode_bf16(p, slots, stream);
  if (p.kv_dtype == DType::f16) return cuda::launch_decode_f16(p, slots, stream);
  if (p.kv_dtype == DType::f8e4m3)
    return cuda::launch_decode_e4m3(p, slots, cuda::force_portable(), stream);
  return cuda::launch_decode_i8(p, slots, stream);
}

}  // namespace
#endif

void run_cuda(const attention::Call& call, const Tensors& t, int64_t capacity,
              bool batch_invariant) {
  const char* op = call.op;
#ifdef FASTINFER_WITH_CUDA
  const auto& s = call.p;
  FI_CHECK(s.dtype != DType::f32, op, ": q must be torch.float16 or torch.bfloat16 on CUDA, got ",
           describe(t.q));
  FI_CHECK(!is_8bit(s.kv_dtype) || s.head_dim % 16 == 0, op,
           ": head_dim must be a multiple of 16 for an 8-bit cache on CUDA, got ", s.head_dim);
  const CudaLaunch device(t.q);
  const int need = cuda::decode_shared_bytes(is_8bit(s.kv_dtype), static_cast<int>(s.head_dim)),
            most = cuda::device_facts().shared_bytes;
  FI_CHECK(need <= most, op, ": head_dim ", s.head_dim, " needs ", need,
           " bytes of shared memory per block, this GPU has ", most,
           "; use flash_attn_varlen_func with block_table, or head_dim up to 128");
  DecodeParams p = decode_params(call, t, capacity, batch_invariant);
  OptTensor own_q, counters, partials;
  const bool readable =
      aligned(s.q, 4) && p.q_batch % 2 == 0 && s.q_token % 2 == 0 && s.q_head % 2 == 0;
  if (t.q.numel() > 0 && (s.rotary.cos || !readable)) {
    own_q = torch::stable::new_empty(t.q, t.q.sizes());
    p.q = own_q->const_data_ptr();
    p.q_head = s.head_dim, p.q_token = s.head_dim * s.heads_q;
    p.q_batch = p.q_token * t.q.size(1);
    p.query_packs = true;
  }
  if (p.append > 0 || own_q)
    check_launch(
        op, cuda::launch_append(append_params(call, t, own_q ? own_q->mutable_data_ptr() : nullptr),
                                device.stream()));
  if (t.q.numel() == 0) return;
  p.large = p.row_tiles == 2 && p.kv_dtype == DType::bf16 && p.dim > 64 && p.dim <= 128 &&
            cuda::device_facts().shared_bytes >= cuda::large_shared_bytes() && is_plain(p) &&
            choose_large(p.batch, p.heads_kv, capacity);
  const int slots = cuda::device_facts().sms * (s.head_dim > 128 || p.large ? 1 : 2);
  const int64_t pairs = int64_t{p.heads_kv} * p.row_blocks;
  p.lanes = static_cast<int32_t>(choose_lanes(pairs, slots));
#ifdef FASTINFER_HAVE_SM90A  // code of compute_80 that a driver compiled knows no clusters
  if (is_plain(p) && p.row_tiles == 1 && s.head_dim <= 128 &&
      cuda::device_facts().compute_capability == 90 && !cuda::force_portable()) {
    const Clusters c =
        choose_clusters(p.batch, p.heads_kv, p.row_blocks, capacity, is_8bit(s.kv_dtype), slots);
    const auto log2 = [](int64_t n) { return n == 8 ? 3 : static_cast<int32_t>(n / 2); };
    p.cluster_shift = log2(c.size), p.parts_shift = log2(c.parts);
    p.least_share = static_cast<int32_t>(c.least_share);
    p.most_share = static_cast<int32_t>(c.most_share);
    if (c.size > 1) p.lanes = static_cast<int32_t>(pairs);
  }
#endif
  p.lane_items = static_cast<int32_t>(pairs / p.lanes);
  p.min_share = p.rows > 32 ? 4 : p.rows > 16 && !has_several_queries(p) ? 2 : 1;
  p.item_cost = 2;
  place_workspace(op, p, slots, t, counters, partials);
  check_launch(op, launch_attention(p, slots, device.stream()));
#else
  no_cuda_kernel(op);
#endif
}

}  // namespace fastinfer::paged_attention
