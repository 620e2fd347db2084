// flash_attn_fwd and flash_attn_varlen_fwd: attention of many query tokens over dense, packed or
// paged keys.
//
//   q [B, Sq, Hq, D] or packed [T, Hq, D]; k, v [B, Sk, Hkv, D], packed [Tk, Hkv, D], or caches
//   [num_blocks, P, Hkv, D] read through block_table [B, max_blocks]; out like q; lse fp32
//   [B, Hq, Sq] or [Hq, T]. Masks align the last query with the last key of a sequence. Rows of a
//   packed q that belong to no sequence are not written.
#include <algorithm>

#include "../cuda/flash_attention/flash_attention.h"
#include "attention.h"
#ifdef FASTINFER_WITH_CUDA
#include "cuda_shim.h"
#endif

namespace fastinfer {
namespace {

using attention::Call;
using attention::Ints;

// What the CUDA kernels take from the checked call; lengths and index tensors are added by the
// operator. Nothing here looks at device data.
cuda::FlashAttentionParams cuda_params(const Call& call) {
  const auto& p = call.p;
  FI_CHECK(
      p.dtype != DType::f32, call.op,
      ": q must be torch.float16 or torch.bfloat16 on CUDA, got torch.float32; convert it with "
      ".to(torch.bfloat16)");
  cuda::FlashAttentionParams c{};
  c.q = p.q, c.out = p.out, c.lse = p.lse;
  c.k = p.k, c.v = p.v;
  c.dtype = p.dtype, c.kv_dtype = p.kv_dtype;
  c.q_token = p.q_token, c.q_head = p.q_head;
  c.out_token = p.out_token, c.out_head = p.out_head;
  c.lse_token = p.lse_token, c.lse_head = p.lse_head;
  c.heads_q = static_cast<int32_t>(p.heads_q);
  c.heads_kv = static_cast<int32_t>(p.heads_kv);
  c.group = static_cast<int32_t>(p.group);
  c.head_dim = static_cast<int32_t>(p.head_dim);
  const auto window = [](int64_t keys) {
    return keys < 0 || keys >= cuda::kMaxKeys ? -1 : static_cast<int32_t>(keys);
  };
  c.window_left = window(p.window_left);
  c.window_right = window(p.window_right);
  c.scale = p.scale, c.softcap = p.softcap;
  c.alibi = p.alibi, c.alibi_batch = p.alibi_batch, c.alibi_head = p.alibi_head;
  c.sinks = p.sinks, c.sinks_dtype = p.sinks_dtype, c.sinks_stride = p.sinks_stride;
  return c;
}

int32_t length(const char* op, const char* what, int64_t n) {
  FI_CHECK(n < cuda::kMaxKeys, op, ": ", what, " must be below 2^30 on CUDA, got ", n);
  return static_cast<int32_t>(n);
}

void flash_attn_fwd(Tensor q, Tensor k, Tensor v, Tensor out, OptTensor lse, double softmax_scale,
                    bool causal, int64_t window_left, int64_t window_right, double softcap,
                    OptTensor alibi_slopes, OptTensor sinks, OptTensor k_scale, OptTensor v_scale,
                    OptTensor plan, bool batch_invariant, OptTensor workspace) {
  const char* op = "flash_attn_func";
  check_dim(op, "q", q, 4);
  check_dim(op, "k", k, 4);
  const int64_t batch = q.size(0), len_q = q.size(1), len_k = k.size(1);
  FI_CHECK(k.size(0) == batch, op, ": k must have the batch size of q (", batch, "), got ",
           describe(k));
  Call call{op};
  attention::setup(call, q, k, v, "k", "v", out, lse, {batch, q.size(2), len_q}, batch,
                   {softmax_scale, causal, window_left, window_right, softcap, alibi_slopes, sinks,
                    k_scale, v_scale});
  attention::check_plan(op, plan, q, batch, call.p.heads_kv, len_q, 0);
  if (q.numel() == 0) return;
  if (lse) {
    call.p.lse_head = lse->stride(1);
    call.p.lse_token = lse->stride(2);
  }
  const auto& p = call.p;
  if (!q.is_cpu()) {
    [[maybe_unused]] cuda::FlashAttentionParams c = cuda_params(call);
    c.batch = length(op, "the batch size", batch);
    c.len_q = length(op, "the sequence length of q", len_q);
    c.len_k = length(op, "the sequence length of k", len_k);
    c.q_batch = q.stride(0), c.out_batch = out.stride(0);
    c.lse_batch = lse ? lse->stride(0) : 0;
    FI_CUDA(op, q, cuda::launch_flash_attention(c, stream));
    return;
  }
  for (int64_t b = 0; b < batch; ++b)
    call.sequences.push_back({b * q.stride(0), b * out.stride(0), lse ? b * lse->stride(0) : 0,
                              b * p.k.page, b * p.v.page, b * p.k.scale_page, b * p.v.scale_page, b,
                              len_q, len_k, 0, 0, nullptr});
  attention::run_cpu(call);
}

// Values of cu_seqlens: 0 <= c[0] <= c[1] <= ... <= limit.
void check_cumulative(const char* op, const char* arg, const Ints& c, int64_t batch, int64_t limit,
                      const char* limit_name) {
  FI_CHECK(c[0] >= 0, op, ": ", arg, " must start at 0 or later, got ", c[0]);
  for (int64_t b = 0; b < batch; ++b)
    FI_CHECK(c[b] <= c[b + 1], op, ": ", arg, " must not decrease, got ", c[b], " then ", c[b + 1],
             " at position ", b + 1);
  FI_CHECK(c[batch] <= limit, op, ": ", arg, " must end within ", limit_name, " (", limit,
           "), got ", c[batch]);
}

// The index tensors of a packed call, in memory the host can read.
struct Index {
  Ints cu_q;
  std::optional<Ints> cu_k, used_k;
  const int32_t* table;  // nullptr: not paged
  int64_t table_stride;
};

struct Limits {
  int64_t batch, tokens, capacity, max_seqlen_q, max_seqlen_k, num_blocks;
};

// Checks lengths and block ids; appends to call.sequences.
void add_sequences(Call& call, const Index& index, const Limits& limits) {
  const char* op = call.op;
  const auto& p = call.p;
  const int64_t batch = limits.batch, capacity = limits.capacity;
  const bool paged = index.table != nullptr;
  check_cumulative(op, "cu_seqlens_q", index.cu_q, batch, limits.tokens, "the tokens of q");
  if (index.cu_k)
    check_cumulative(op, "cu_seqlens_k", *index.cu_k, batch, paged ? INT64_MAX : capacity,
                     "the tokens of k");
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t start = index.cu_q[b], len_q = index.cu_q[b + 1] - start;
    int64_t start_k = 0, len_k = capacity;
    if (index.cu_k) {
      const Ints& cu_k = *index.cu_k;
      start_k = paged ? 0 : cu_k[b];
      len_k = cu_k[b + 1] - cu_k[b];
    }
    if (index.used_k) {
      const int64_t used = (*index.used_k)[b], room = paged ? capacity : len_k;
      FI_CHECK(used >= 0 && used <= room, op, ": seqused_k[", b, "] must be from 0 to ", room,
               " (the keys there is room for), got ", used);
      len_k = used;
    }
    FI_CHECK(!paged || len_k <= capacity, op, ": sequence ", b, " has ", len_k,
             " keys, but a row of block_table addresses only ", capacity, "; give it more columns");
    FI_CHECK(len_q <= limits.max_seqlen_q, op,
             ": max_seqlen_q must be at least the longest sequence of q (", len_q, "), got ",
             limits.max_seqlen_q);
    FI_CHECK(len_k <= limits.max_seqlen_k, op,
             ": max_seqlen_k must be at least the longest sequence of k (", len_k, "), got ",
             limits.max_seqlen_k);
    const int32_t* pages = paged ? index.table + b * index.table_stride : nullptr;
    call.sequences.push_back({start * p.q_token, start * p.out_token, start * p.lse_token,
                              start_k * p.k.token, start_k * p.v.token, start_k * p.k.scale_token,
                              start_k * p.v.scale_token, b, len_q, len_k, 0, 0, pages});
    if (pages && len_q > 0) {
      const auto keys = attention::visible_keys(p, call.sequences.back(), 0, len_q - 1);
      attention::check_blocks(op, pages, b, keys.begin, keys.end, p.page_size, limits.num_blocks);
    }
  }
}

// FASTINFER_VALIDATE=1: the same checks on copies of the index tensors.
void validate(Call& call, const Tensor& q, const Tensor& cu_q, const OptTensor& cu_k,
              const OptTensor& used_k, const OptTensor& table, const Limits& limits) {
#ifdef FASTINFER_WITH_CUDA
  const CudaLaunch launch(q);
  std::vector<HostCopy> copies;
  const auto copy = [&](const char* arg, const Tensor& t) {
    copies.emplace_back(call.op, arg, t, launch.stream());
    return static_cast<const int32_t*>(copies.back().data());
  };
  Index index{{copy("cu_seqlens_q", cu_q), cu_q.stride(0)}, {}, {}, nullptr, 0};
  if (cu_k) index.cu_k = Ints{copy("cu_seqlens_k", *cu_k), cu_k->stride(0)};
  if (used_k) index.used_k = Ints{copy("seqused_k", *used_k), used_k->stride(0)};
  if (table) {
    static const int32_t none = 0;
    index.table = copy("block_table", *table);
    if (!index.table) index.table = &none;  // no columns: no ids
    index.table_stride = table->stride(0);
  }
  add_sequences(call, index, limits);
#endif
}

void flash_attn_varlen_fwd(Tensor q, Tensor k, Tensor v, Tensor out, OptTensor lse,
                           Tensor cu_seqlens_q, OptTensor cu_seqlens_k, int64_t max_seqlen_q,
                           int64_t max_seqlen_k, OptTensor seqused_k, OptTensor block_table,
                           double softmax_scale, bool causal, int64_t window_left,
                           int64_t window_right, double softcap, OptTensor alibi_slopes,
                           OptTensor sinks, OptTensor k_scale, OptTensor v_scale, OptTensor plan,
                           bool batch_invariant, OptTensor workspace) {
  const char* op = "flash_attn_varlen_func";
  check_dim(op, "q", q, 3);
  check_dim(op, "k", k, block_table ? 4 : 3);
  check_dim(op, "cu_seqlens_q", cu_seqlens_q, 1);
  FI_CHECK(cu_seqlens_q.size(0) >= 1, op, ": cu_seqlens_q must have shape [batch + 1], got ",
           describe(cu_seqlens_q));
  const int64_t tokens = q.size(0), batch = cu_seqlens_q.size(0) - 1;
  Call call{op};
  attention::setup(call, q, k, v, "k", "v", out, lse, {q.size(1), tokens}, batch,
                   {softmax_scale, causal, window_left, window_right, softcap, alibi_slopes, sinks,
                    k_scale, v_scale});
  auto& p = call.p;
  attention::check_ints(op, "cu_seqlens_q", cu_seqlens_q, batch + 1, q);
  if (cu_seqlens_k) attention::check_ints(op, "cu_seqlens_k", *cu_seqlens_k, batch + 1, q);
  if (seqused_k) attention::check_ints(op, "seqused_k", *seqused_k, batch, q);
  FI_CHECK(cu_seqlens_k || (block_table && seqused_k), op,
           ": cu_seqlens_k may only be left out when block_table and seqused_k are given");
  FI_CHECK(max_seqlen_q >= 0 && max_seqlen_k >= 0, op,
           ": max_seqlen_q and max_seqlen_k must be >= 0, got ", max_seqlen_q, " and ",
           max_seqlen_k);
  const int64_t capacity =
      block_table ? attention::check_block_table(op, *block_table, k, batch) : k.size(0);
  attention::check_plan(op, plan, q, batch, p.heads_kv, max_seqlen_q, 0);
  if (q.numel() == 0 || batch == 0) return;
  if (lse) {
    p.lse_head = lse->stride(0);
    p.lse_token = lse->stride(1);
  }
  if (block_table) p.page_size = k.size(1);
  const Limits limits{batch, tokens, capacity, max_seqlen_q, max_seqlen_k, k.size(0)};

  if (q.is_cpu()) {
    Index index{attention::ints(cu_seqlens_q), {}, {}, nullptr, 0};
    if (cu_seqlens_k) index.cu_k = attention::ints(*cu_seqlens_k);
    if (seqused_k) index.used_k = attention::ints(*seqused_k);
    if (block_table) {
      index.table = static_cast<const int32_t*>(block_table->const_data_ptr());
      index.table_stride = block_table->stride(0);
    }
    add_sequences(call, index, limits);
    attention::run_cpu(call);
    return;
  }

  cuda::FlashAttentionParams c = cuda_params(call);
  const auto device_ints = [](const OptTensor& t, const int32_t*& data, int64_t& stride) {
    if (!t) return;
    data = static_cast<const int32_t*>(t->const_data_ptr());
    stride = t->stride(0);
  };
  device_ints(cu_seqlens_q, c.cu_q, c.cu_q_stride);
  device_ints(cu_seqlens_k, c.cu_k, c.cu_k_stride);
  device_ints(seqused_k, c.used_k, c.used_k_stride);
  device_ints(block_table, c.table, c.table_stride);
  c.batch = length(op, "the batch size", batch);
  c.len_q = length(op, "max_seqlen_q", std::min(max_seqlen_q, tokens));
  c.len_k = static_cast<int32_t>(std::min(max_seqlen_k, cuda::kMaxKeys));
  c.tokens_q = length(op, "the number of tokens of q", tokens);
  c.tokens_k = block_table ? 0 : length(op, "the number of tokens of k", k.size(0));
  if (block_table) {
    c.page_size = length(op, "the block size", k.size(1));
    c.page_shift = -1;
    for (int32_t i = 0; i < 30; ++i)
      if (c.page_size == 1 << i) c.page_shift = i;
    c.num_pages = k.size(0);
  }
  if (validate_data())
    validate(call, q, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, limits);
  FI_CUDA(op, q, cuda::launch_flash_attention(c, stream));
}

}  // namespace

FI_REGISTER_BOTH({
  m.impl("flash_attn_fwd", TORCH_BOX(&flash_attn_fwd));
  m.impl("flash_attn_varlen_fwd", TORCH_BOX(&flash_attn_varlen_fwd));
})

}  // namespace fastinfer
