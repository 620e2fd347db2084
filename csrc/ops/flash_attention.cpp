// flash_attn_fwd and flash_attn_varlen_fwd: attention of many query tokens over dense, packed or
// paged keys.
//
//   q [B, Sq, Hq, D] or packed [T, Hq, D]; k, v [B, Sk, Hkv, D], packed [Tk, Hkv, D], or caches
//   [num_blocks, P, Hkv, D] read through block_table [B, max_blocks]; out like q; lse fp32
//   [B, Hq, Sq] or [Hq, T]. Masks align the last query with the last key of a sequence. Rows of a
//   packed q that belong to no sequence are not written.
#include "attention.h"

namespace fastinfer {
namespace {

using attention::Call;
using attention::Ints;

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
  if (!q.is_cpu()) no_cuda_kernel(op);
  if (lse) {
    call.p.lse_head = lse->stride(1);
    call.p.lse_token = lse->stride(2);
  }
  const auto& p = call.p;
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
  if (!q.is_cpu()) no_cuda_kernel(op);

  const Ints cu_q = attention::ints(cu_seqlens_q);
  check_cumulative(op, "cu_seqlens_q", cu_q, batch, tokens, "the tokens of q");
  if (cu_seqlens_k)
    check_cumulative(op, "cu_seqlens_k", attention::ints(*cu_seqlens_k), batch,
                     block_table ? INT64_MAX : capacity, "the tokens of k");
  if (lse) {
    p.lse_head = lse->stride(0);
    p.lse_token = lse->stride(1);
  }
  if (block_table) p.page_size = k.size(1);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t start = cu_q[b], len_q = cu_q[b + 1] - start;
    int64_t start_k = 0, len_k = capacity;
    if (cu_seqlens_k) {
      const Ints cu_k = attention::ints(*cu_seqlens_k);
      start_k = block_table ? 0 : cu_k[b];
      len_k = cu_k[b + 1] - cu_k[b];
    }
    if (seqused_k) {
      const int64_t used = attention::ints(*seqused_k)[b], room = block_table ? capacity : len_k;
      FI_CHECK(used >= 0 && used <= room, op, ": seqused_k[", b, "] must be from 0 to ", room,
               " (the keys there is room for), got ", used);
      len_k = used;
    }
    FI_CHECK(!block_table || len_k <= capacity, op, ": sequence ", b, " has ", len_k,
             " keys, but a row of block_table addresses only ", capacity, "; give it more columns");
    FI_CHECK(len_q <= max_seqlen_q, op,
             ": max_seqlen_q must be at least the longest sequence of q (", len_q, "), got ",
             max_seqlen_q);
    FI_CHECK(len_k <= max_seqlen_k, op,
             ": max_seqlen_k must be at least the longest sequence of k (", len_k, "), got ",
             max_seqlen_k);
    const int32_t* pages = nullptr;
    if (block_table)
      pages =
          static_cast<const int32_t*>(block_table->const_data_ptr()) + b * block_table->stride(0);
    call.sequences.push_back({start * p.q_token, start * p.out_token, start * p.lse_token,
                              start_k * p.k.token, start_k * p.v.token, start_k * p.k.scale_token,
                              start_k * p.v.scale_token, b, len_q, len_k, 0, 0, pages});
    if (pages && len_q > 0) {
      const auto keys = attention::visible_keys(p, call.sequences.back(), 0, len_q - 1);
      attention::check_blocks(op, pages, b, keys.begin, keys.end, p.page_size, k.size(0));
    }
  }
  attention::run_cpu(call);
}

}  // namespace

FI_REGISTER_BOTH({
  m.impl("flash_attn_fwd", TORCH_BOX(&flash_attn_fwd));
  m.impl("flash_attn_varlen_fwd", TORCH_BOX(&flash_attn_varlen_fwd));
})

}  // namespace fastinfer
