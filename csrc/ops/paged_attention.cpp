// flash_attn_kvcache, plan_decode, merge_attn_states: decoding over a dense or paged cache.
//
//   q [B, Sq, Hq, D]; caches [B_cache, S, Hkv, D], or [num_blocks, P, Hkv, D] with block_table
//   [B, max_blocks]; new k, v [B, Snew, Hkv, D] go to positions cache_seqlens[b] + i first, rotated
//   and quantised on the way; then every query sees its sequence's keys [leftpad, cache_seqlens +
//   Snew), masks aligned at the end. CPU: see csrc/cpu/attention.h.
//
// The plan, int32 [8 + B + 1]: {version = 1, batch, num_heads_kv, q_len, append, tile_tokens = 64,
// num_slots, share}, then the running sum over sequences of cost_b = max(1, visible tiles), starting
// at 0. share = ceil(num_heads_kv * total / num_slots): slot s works on cost [s * share, (s + 1) *
// share) of the list (sequence, key head, tile). share = 0 stands for pieces of 1024 tokens at
// absolute positions (batch_invariant). The CUDA kernel takes the running sums and divides them
// among its own slots; without a plan every CTA adds the lengths up by itself. The CPU kernel checks
// the header and divides the work by itself, always at absolute positions.
#include "paged_attention.h"

#include <algorithm>
#include <memory>

#ifdef FASTINFER_WITH_CUDA
#include "../cuda/common/launch.h"
#include "../cuda/paged_attention/paged_attention.h"
#include "cuda_shim.h"
#endif

namespace fastinfer {
namespace {

using attention::Call;
using attention::Ints;

using paged_attention::kPlanHeader;
using paged_attention::kPlanVersion;

// Work of one sequence and key head, in tiles of the keys that some query sees.
int64_t decode_cost(int64_t len, int64_t len_q, int64_t window_left) {
  const int64_t first = window_left < 0 ? 0 : std::max<int64_t>(0, len - len_q - window_left);
  return std::max<int64_t>(
      1, (len + cpu::kTile - 1) / cpu::kTile - std::min(first, len) / cpu::kTile);
}

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
  attention::check_plan_header(op, data, static_cast<int64_t>(lengths.after.size()), call.p.heads_kv,
                               len_q, lengths.after[0] - lengths.before[0]);
  for (size_t b = 0; b < lengths.after.size(); ++b) {
    const int64_t cost = decode_cost(lengths.after[b], len_q, call.p.window_left);
    const int64_t got = data[kPlanHeader + b + 1] - data[kPlanHeader + b];
    FI_CHECK(got == cost, op, ": plan must be made from these cache_seqlens, append and window_size: ",
             "sequence ", b, " has ", cost, " tiles, the plan says ", got);
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
  const paged_attention::Tensors tensors{
      q,          k_cache,       k,       v,       out,  lse,
      rotary_cos, rotary_sin,    cache_seqlens,    cache_batch_idx,
      cache_leftpad, block_table, k_scale, v_scale, plan, workspace};
  if (len_new > 0) {
    check_written(op, "k_cache", k_cache);
    check_written(op, "v_cache", v_cache);
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

void plan_decode(Tensor cache_seqlens, int64_t num_heads_q, int64_t num_heads_kv, int64_t head_dim,
                 int64_t q_len, int64_t append, int64_t window_left, int64_t window_right,
                 int64_t num_slots, bool batch_invariant, Tensor plan) {
  const char* op = "plan_decode";
  check_dim(op, "cache_seqlens", cache_seqlens, 1);
  const int64_t batch = cache_seqlens.size(0);
  attention::check_ints(op, "cache_seqlens", cache_seqlens, batch, cache_seqlens);
  FI_CHECK(num_heads_kv > 0 && num_heads_q > 0 && num_heads_q % num_heads_kv == 0, op,
           ": num_heads_q must be a multiple of num_heads_kv, got ", num_heads_q, " and ",
           num_heads_kv);
  FI_CHECK(head_dim >= 16 && head_dim <= cpu::kMaxHeadDim && head_dim % 8 == 0, op,
           ": head_dim must be a multiple of 8 from 16 to 256, got ", head_dim);
  FI_CHECK(q_len >= 1 && append >= 0 && num_slots >= 1, op,
           ": q_len must be >= 1, append >= 0 and num_slots >= 1, got ", q_len, ", ", append,
           " and ", num_slots);
  FI_CHECK(window_left >= -1 && window_right >= -1, op,
           ": window_size must be two integers >= -1 (-1: unlimited), got (", window_left, ", ",
           window_right, ")");
  check_dtype(op, "out", plan, {DType::i32});
  check_shape(op, "out", plan, {kPlanHeader + batch + 1});
  check_last_dim(op, "out", plan);
  check_device(op, cache_seqlens, {{"out", &plan}});
  if (!plan.is_cpu()) {
    FI_CUDA(op, plan,
            cuda::launch_plan(static_cast<const int32_t*>(cache_seqlens.const_data_ptr()),
                              cache_seqlens.stride(0), batch, num_heads_kv, q_len, append,
                              window_left, num_slots, batch_invariant,
                              static_cast<int32_t*>(plan.mutable_data_ptr()), stream));
    return;
  }
  const Ints lens = attention::ints(cache_seqlens);
  int64_t total = 0;
  std::vector<int64_t> sums{0};
  for (int64_t b = 0; b < batch; ++b) {
    FI_CHECK(lens[b] >= 0, op, ": cache_seqlens[", b, "] must be >= 0, got ", lens[b]);
    total += decode_cost(lens[b] + append, q_len, window_left);
    sums.push_back(total);
  }
  FI_CHECK(num_heads_kv * total <= INT32_MAX, op,
           ": num_heads_kv times the tiles of all sequences must fit in 32 bits, got ",
           num_heads_kv * total, "; plan fewer sequences at once");
  const int64_t share =
      batch_invariant ? 0
                      : std::max<int64_t>(1, (num_heads_kv * total + num_slots - 1) / num_slots);
  const int64_t header[kPlanHeader] = {kPlanVersion, batch,      num_heads_kv, q_len,
                                       append,       cpu::kTile, num_slots,    share};
  int32_t* out = static_cast<int32_t*>(plan.mutable_data_ptr());
  for (int64_t i = 0; i < kPlanHeader; ++i) out[i] = static_cast<int32_t>(header[i]);
  for (int64_t b = 0; b <= batch; ++b) out[kPlanHeader + b] = static_cast<int32_t>(sums[b]);
}

void merge_attn_states(Tensor prefix_output, Tensor prefix_lse, Tensor suffix_output,
                       Tensor suffix_lse, Tensor out, OptTensor out_lse) {
  const char* op = "merge_attn_states";
  const int64_t n = prefix_output.dim();
  FI_CHECK(n == 3 || n == 4, op, ": prefix_output must have shape [T, H, D] or [B, S, H, D], got ",
           describe(prefix_output));
  check_dtype(op, "prefix_output", prefix_output, {DType::f32, DType::f16, DType::bf16});
  const int64_t batch = n == 4 ? prefix_output.size(0) : 1, tokens = prefix_output.size(n - 3);
  const int64_t heads = prefix_output.size(n - 2);
  check_device(op, prefix_output,
               {{"prefix_lse", &prefix_lse},
                {"suffix_output", &suffix_output},
                {"suffix_lse", &suffix_lse},
                {"out", &out},
                {"out_lse", ptr(out_lse)}});
  cpu::MergeStatesParams p{};
  p.dtype = dtype_of(prefix_output);
  p.batch = batch, p.tokens = tokens, p.heads = heads, p.head_dim = prefix_output.size(n - 1);
  auto values = [&](const char* arg, const Tensor& t, int64_t* stride) {
    check_same_dtype(op, arg, t, "prefix_output", prefix_output);
    FI_CHECK(t.sizes() == prefix_output.sizes(), op, ": ", arg,
             " must have the shape of prefix_output (", shape_of(prefix_output), "), got ",
             describe(t));
    check_last_dim(op, arg, t);
    stride[0] = n == 4 ? t.stride(0) : 0;
    stride[1] = t.stride(n - 3);
    stride[2] = t.stride(n - 2);
  };
  auto lse = [&](const char* arg, const Tensor& t, int64_t* stride) {
    check_dtype(op, arg, t, {DType::f32});
    if (n == 4)
      check_shape(op, arg, t, {batch, heads, tokens});
    else
      check_shape(op, arg, t, {heads, tokens});
    stride[0] = n == 4 ? t.stride(0) : 0;
    stride[1] = t.stride(n - 2);
    stride[2] = t.stride(n - 3);
  };
  values("prefix_output", prefix_output, p.prefix_stride);
  values("suffix_output", suffix_output, p.suffix_stride);
  values("out", out, p.out_stride);
  lse("prefix_lse", prefix_lse, p.prefix_lse_stride);
  lse("suffix_lse", suffix_lse, p.suffix_lse_stride);
  if (out_lse) lse("out_lse", *out_lse, p.out_lse_stride);
  if (batch * tokens * heads == 0) return;
  p.prefix = prefix_output.const_data_ptr();
  p.suffix = suffix_output.const_data_ptr();
  p.prefix_lse = static_cast<const float*>(prefix_lse.const_data_ptr());
  p.suffix_lse = static_cast<const float*>(suffix_lse.const_data_ptr());
  p.out = out.mutable_data_ptr();
  if (out_lse) p.out_lse = static_cast<float*>(out_lse->mutable_data_ptr());
  if (!prefix_output.is_cpu()) {
    FI_CUDA(op, prefix_output, cuda::launch_merge_states(p, stream));
    return;
  }
  torch::stable::parallel_for(
      0, batch * tokens * heads, grain(p.head_dim * 4),
      [&](int64_t begin, int64_t end) { FI_PICK(merge_attn_states)(p, begin, end); });
}

}  // namespace

FI_REGISTER_BOTH({
  m.impl("flash_attn_kvcache", TORCH_BOX(&flash_attn_kvcache));
  m.impl("plan_decode", TORCH_BOX(&plan_decode));
  m.impl("merge_attn_states", TORCH_BOX(&merge_attn_states));
})

}  // namespace fastinfer
