// flash_attn_kvcache: decoding over a dense or paged cache.
//
//   q [B, Sq, Hq, D]; caches [B_cache, S, Hkv, D], or [num_blocks, P, Hkv, D] with block_table
//   [B, max_blocks]; new k, v [B, Snew, Hkv, D] go to positions cache_seqlens[b] + i first, rotated
//   and quantised on the way; then every query sees its sequence's keys [leftpad, cache_seqlens +
//   Snew), masks aligned at the end. CPU: see csrc/cpu/attention.h; CUDA: paged_attention_cuda.cpp
//   and csrc/cuda/paged_attention/params.h.
#include "paged_attention.h"

#include <algorithm>
#include <memory>

#ifdef FASTINFER_WITH_CUDA
#include "cuda_shim.h"
#endif

namespace fastinfer {
namespace {

using attention::Call;
using attention::Ints;
using paged_attention::kPlanHeader;

// Where each sequence's keys lie and how many there are.
struct Lengths {
  std::vector<int64_t> before, after;  // cached before this call, visible after it
};

void check_new(const char* op, const Tensor& q, const Tensor& k_cache, const OptTensor& k,
               const OptTensor& v, const OptTensor& cache_seqlens) {
  FI_CHECK(k.has_value() == v.has_value(), op, ": k and v must be given together, got only ",
           k ? "k" : "v");
  if (!k) return;
  FI_CHECK(cache_seqlens.has_value(), op,
           ": cache_seqlens must be given with k and v, it says where they are written");
  check_shape(op, "k", *k, {q.size(0), -1, k_cache.size(2), k_cache.size(3)});
  check_shape(op, "v", *v, {q.size(0), k->size(1), k_cache.size(2), k_cache.size(3)});
  check_same_dtype(op, "k", *k, "q", q);
  check_same_dtype(op, "v", *v, "q", q);
  check_last_dim(op, "k", *k);
  check_last_dim(op, "v", *v);
  check_device(op, q, {{"k", &*k}, {"v", &*v}});
}

cpu::RotaryTable rotary_table(const char* op, const Tensor& q, const OptTensor& cos,
                              const OptTensor& sin, bool interleaved, bool has_new) {
  FI_CHECK(cos.has_value() == sin.has_value(), op,
           ": rotary_cos and rotary_sin must be given together, got only ",
           cos ? "rotary_cos" : "rotary_sin");
  if (!cos) return {};
  FI_CHECK(has_new, op,
           ": rotary_cos and rotary_sin need the new k and v; to rotate q alone call apply_rotary");
  check_dim(op, "rotary_cos", *cos, 2);
  check_shape(op, "rotary_sin", *sin, {cos->size(0), cos->size(1)});
  check_same_dtype(op, "rotary_sin", *sin, "rotary_cos", *cos);
  FI_CHECK(dtype_of(*cos) == DType::f32 || dtype_of(*cos) == dtype_of(q), op,
           ": rotary_cos must be torch.float32 or have the dtype of q (",
           dtype_name(q.scalar_type()), "), got ", describe(*cos));
  const int64_t dim = 2 * cos->size(1);
  FI_CHECK(dim > 0 && dim <= q.size(3), op,
           ": rotary_cos must have shape [positions, rotary_dim / 2] with rotary_dim <= head_dim (",
           q.size(3), "), got ", describe(*cos));
  check_last_dim(op, "rotary_cos", *cos);
  check_last_dim(op, "rotary_sin", *sin);
  check_device(op, q, {{"rotary_cos", &*cos}, {"rotary_sin", &*sin}});
  return {cos->const_data_ptr(),
          sin->const_data_ptr(),
          dtype_of(*cos),
          cos->stride(0),
          sin->stride(0),
          dim,
          interleaved};
}

void check_distinct(const char* op, const Ints& rows, int64_t batch) {
  std::vector<int64_t> sorted;
  for (int64_t b = 0; b < batch; ++b) sorted.push_back(rows[b]);
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  FI_CHECK(twice == sorted.end(), op,
           ": cache_batch_idx must not name a cache row twice when k and v are appended, got ",
           *twice, " twice");
}

// With FASTINFER_VALIDATE=1: no two sequences append to the same slot of a paged cache.
void check_slots(const char* op, const Call& call, const Lengths& lengths) {
  std::vector<int64_t> slots;
  for (size_t b = 0; b < call.sequences.size(); ++b)
    for (int64_t i = lengths.before[b]; i < lengths.after[b]; ++i)
      slots.push_back(call.sequences[b].pages[i / call.p.page_size] * call.p.page_size +
                      i % call.p.page_size);
  std::sort(slots.begin(), slots.end());
  const auto twice = std::adjacent_find(slots.begin(), slots.end());
  FI_CHECK(twice == slots.end(), op, ": two sequences append to the same cache slot ", *twice,
           " (block ", *twice / call.p.page_size, "); copy a shared block before writing to it");
}

void append(const Call& call, const Lengths& lengths, const Tensor& k, const Tensor& v,
            const Tensor& k_cache, const Tensor& v_cache, const OptTensor& k_scale,
            const OptTensor& v_scale) {
  const auto& p = call.p;
  cpu::AppendParams a{};
  a.k = k.const_data_ptr();
  a.v = v.const_data_ptr();
  a.k_batch = k.stride(0), a.k_token = k.stride(1), a.k_head = k.stride(2);
  a.v_batch = v.stride(0), a.v_token = v.stride(1), a.v_head = v.stride(2);
  a.k_cache = k_cache.mutable_data_ptr();
  a.v_cache = v_cache.mutable_data_ptr();
  if (k_scale) a.k_scale = static_cast<float*>(k_scale->mutable_data_ptr());
  if (v_scale) a.v_scale = static_cast<float*>(v_scale->mutable_data_ptr());
  a.k_layout = p.k, a.v_layout = p.v;
  a.dtype = p.dtype, a.cache_dtype = p.kv_dtype;
  a.tokens = k.size(1), a.heads_kv = p.heads_kv, a.head_dim = p.head_dim;
  a.page_size = p.page_size;
  a.rotary = p.rotary;
  a.sequences = call.sequences.data();
  a.first_position = lengths.before.data();
  torch::stable::parallel_for(
      0, k.size(0) * k.size(1), grain(4 * p.heads_kv * p.head_dim),
      [&](int64_t begin, int64_t end) { FI_PICK(attention_append)(a, begin, end); });
}

// With FASTINFER_VALIDATE=1, on a GPU: the plan was made for these lengths.
void check_plan_data([[maybe_unused]] const char* op, [[maybe_unused]] const OptTensor& plan,
                     [[maybe_unused]] const Call& call, [[maybe_unused]] const Lengths& lengths,
                     [[maybe_unused]] int64_t len_q) {
#ifdef FASTINFER_WITH_CUDA
  if (!plan) return;
  const CudaLaunch device(*plan);
  const HostCopy copy(op, "plan", *plan, device.stream());
  const int32_t* data = static_cast<const int32_t*>(copy.data());
  attention::check_plan_header(op, data, static_cast<int64_t>(lengths.after.size()),
                               call.p.heads_kv, len_q, lengths.after[0] - lengths.before[0]);
  for (size_t b = 0; b < lengths.after.size(); ++b) {
    const int64_t cost = paged_attention::decode_cost(lengths.after[b], len_q, call.p.window_left);
    const int64_t got = data[kPlanHeader + b + 1] - data[kPlanHeader + b];
    FI_CHECK(got == cost, op,
             ": plan must be made from these cache_seqlens, append and window_size: ", "sequence ",
             b, " has ", cost, " tiles, the plan says ", got);
  }
#endif
}

// The index tensors of a call as the host can read them: on a GPU copied, for FASTINFER_VALIDATE=1.
class HostIndices {
 public:
  HostIndices(const char* op, const Tensor& q) : op_(op), q_(q) {}

  Ints operator()(const char* arg, const OptTensor& t) {
    if (!t) return {nullptr, 0};
    if (q_.is_cpu()) return attention::ints(*t);
#ifdef FASTINFER_WITH_CUDA
    const CudaLaunch device(q_);
    copies_.push_back(std::make_unique<HostCopy>(op_, arg, *t, device.stream()));
    return {static_cast<const int32_t*>(copies_.back()->data()), t->stride(0)};
#else
    no_cuda_kernel(op_);
#endif
  }

 private:
  const char* op_;
  const Tensor& q_;
#ifdef FASTINFER_WITH_CUDA
  std::vector<std::unique_ptr<HostCopy>> copies_;
#endif
};

void flash_attn_kvcache(Tensor q, Tensor k_cache, Tensor v_cache, OptTensor k, OptTensor v,
                        Tensor out, OptTensor lse, OptTensor rotary_cos, OptTensor rotary_sin,
                        OptTensor cache_seqlens, OptTensor cache_batch_idx, OptTensor cache_leftpad,
                        OptTensor block_table, double softmax_scale, bool causal,
                        int64_t window_left, int64_t window_right, double softcap,
                        bool rotary_interleaved, OptTensor alibi_slopes, int64_t num_splits,
                        OptTensor sinks, OptTensor k_scale, OptTensor v_scale, OptTensor plan,
                        bool batch_invariant, OptTensor workspace) {
  const char* op = "flash_attn_with_kvcache";
  check_dim(op, "q", q, 4);
  check_dim(op, "k_cache", k_cache, 4);
  const int64_t batch = q.size(0), len_q = q.size(1);
  Call call{op};
  attention::setup(call, q, k_cache, v_cache, "k_cache", "v_cache", out, lse,
                   {batch, q.size(2), len_q}, batch,
                   {softmax_scale, causal, window_left, window_right, softcap, alibi_slopes, sinks,
                    k_scale, v_scale});
  auto& p = call.p;
  check_new(op, q, k_cache, k, v, cache_seqlens);
  p.rotary = rotary_table(op, q, rotary_cos, rotary_sin, rotary_interleaved, k.has_value());
  p.rotary_per_token = p.window_left >= 0 || p.window_right >= 0;
  if (cache_seqlens) attention::check_ints(op, "cache_seqlens", *cache_seqlens, batch, q);
  if (cache_leftpad) attention::check_ints(op, "cache_leftpad", *cache_leftpad, batch, q);
  FI_CHECK(num_splits >= 0, op, ": num_splits must be >= 0 (0: chosen here), got ", num_splits);
  int64_t capacity = k_cache.size(1);
  if (block_table) {
    FI_CHECK(!cache_batch_idx, op,
             ": cache_batch_idx is for dense caches, got it with block_table; reorder the rows of "
             "block_table");
    capacity = attention::check_block_table(op, *block_table, k_cache, batch);
    p.page_size = k_cache.size(1);
  } else if (cache_batch_idx) {
    attention::check_ints(op, "cache_batch_idx", *cache_batch_idx, batch, q);
  } else {
    FI_CHECK(k_cache.size(0) >= batch, op, ": k_cache must hold at least the batch of q (", batch,
             "), got ", describe(k_cache), "; pass block_table for a paged cache");
  }
  const int64_t len_new = k ? k->size(1) : 0;
  attention::check_plan(op, plan, q, batch, p.heads_kv, len_q, len_new);
  if (batch == 0 || (q.numel() == 0 && len_new == 0)) return;
  const paged_attention::Tensors tensors{q,
                                         k_cache,
                                         k,
                                         v,
                                         out,
                                         lse,
                                         rotary_cos,
                                         rotary_sin,
                                         cache_seqlens,
                                         cache_batch_idx,
                                         cache_leftpad,
                                         block_table,
                                         k_scale,
                                         v_scale,
                                         plan,
                                         workspace};
  if (len_new > 0) {
    check_written(op, "k_cache", k_cache);
    check_written(op, "v_cache", v_cache);
    FI_CHECK(k_cache.const_data_ptr() != v_cache.const_data_ptr() || k_cache.numel() == 0, op,
             ": v_cache must not be k_cache when k and v are appended: both are written; pass two "
             "tensors");
  }
  if (!q.is_cpu() && !validate_data()) {
    paged_attention::run_cuda(call, tensors, capacity, batch_invariant);
    return;
  }
  HostIndices on_host(op, q);
  const Ints seqlens = on_host("cache_seqlens", cache_seqlens);
  const Ints leftpad = on_host("cache_leftpad", cache_leftpad);
  const Ints cache_rows = on_host("cache_batch_idx", cache_batch_idx);
  const Ints table = on_host("block_table", block_table);

  if (lse) {
    p.lse_head = lse->stride(1);
    p.lse_token = lse->stride(2);
  }
  Lengths lengths;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t before = cache_seqlens ? seqlens[b] : capacity;
    const int64_t after = before + len_new;
    FI_CHECK(before >= 0 && after <= capacity, op, ": cache_seqlens[", b, "] must be from 0 to ",
             capacity - len_new, " (cache capacity ", capacity, " less ", len_new,
             " new tokens), got ", before);
    int64_t first_key = 0, row = b;
    if (cache_leftpad) {
      first_key = leftpad[b];
      FI_CHECK(first_key >= 0 && first_key <= after, op, ": cache_leftpad[", b,
               "] must be from 0 to the length of the sequence (", after, "), got ", first_key);
    }
    if (cache_batch_idx) {
      row = cache_rows[b];
      FI_CHECK(row >= 0 && row < k_cache.size(0), op, ": cache_batch_idx[", b,
               "] must be a row of k_cache, 0 to ", k_cache.size(0) - 1, ", got ", row);
    }
    if (p.rotary.cos) {
      const int64_t rotated = std::max(len_new, p.rotary_per_token ? len_q : 1);
      FI_CHECK(before + rotated <= rotary_cos->size(0), op,
               ": rotary_cos must reach every rotated position (", before + rotated,
               " rows for sequence ", b, "), got ", describe(*rotary_cos));
    }
    const int32_t* pages = nullptr;
    if (block_table) {
      pages = table.data + b * table.stride;
      row = 0;
    }
    call.sequences.push_back({b * q.stride(0), b * out.stride(0), lse ? b * lse->stride(0) : 0,
                              row * p.k.page, row * p.v.page, row * p.k.scale_page,
                              row * p.v.scale_page, b, len_q, after, first_key, before, pages});
    if (pages) {
      const auto keys = attention::visible_keys(p, call.sequences.back(), 0, len_q - 1);
      attention::check_blocks(op, pages, b, keys.begin, keys.end, p.page_size, k_cache.size(0));
      attention::check_blocks(op, pages, b, before, after, p.page_size, k_cache.size(0));
    }
    lengths.before.push_back(before);
    lengths.after.push_back(after);
  }
  if (len_new > 0) {
    if (cache_batch_idx) check_distinct(op, cache_rows, batch);
    if (block_table && validate_data()) check_slots(op, call, lengths);
  }
  if (!q.is_cpu()) {
    check_plan_data(op, plan, call, lengths, len_q);
    paged_attention::run_cuda(call, tensors, capacity, batch_invariant);
    return;
  }
  if (len_new > 0) {
    append(call, lengths, *k, *v, k_cache, v_cache, k_scale, v_scale);
  }
  if (q.numel() > 0) attention::run_cpu(call);
}

}  // namespace

FI_REGISTER_BOTH({ m.impl("flash_attn_kvcache", TORCH_BOX(&flash_attn_kvcache)); })

}  // namespace fastinfer
