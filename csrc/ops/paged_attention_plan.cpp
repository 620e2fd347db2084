// plan_decode and merge_attn_states, around flash_attn_kvcache.
//
// The plan, int32 [8 + B + 1]: {version = 1, batch, num_heads_kv, q_len, append, tile_tokens = 64,
// num_slots, share}, then the running sum over sequences of cost_b = max(1, visible tiles),
// starting at 0. share = ceil(num_heads_kv * total / num_slots): slot s works on cost [s * share,
// (s + 1) * share) of the list (sequence, key head, tile). share = 0 stands for pieces of 1024
// tokens at absolute positions (batch_invariant). The CUDA kernel takes the running sums and
// divides them among its own slots; without a plan every CTA adds the lengths up by itself. The CPU
// kernel checks the header and divides the work by itself, always at absolute positions.
#include "paged_attention.h"

#include <algorithm>

#ifdef FASTINFER_WITH_CUDA
#include "../cuda/paged_attention/paged_attention.h"
#include "cuda_shim.h"
#endif

namespace fastinfer {

namespace paged_attention {

int64_t decode_cost(int64_t len, int64_t len_q, int64_t window_left) {
  const int64_t first = window_left < 0 ? 0 : std::max<int64_t>(0, len - len_q - window_left);
  return std::max<int64_t>(1,
                           (len + cpu::kTile - 1) / cpu::kTile - std::min(first, len) / cpu::kTile);
}

}  // namespace paged_attention

namespace {

using attention::Ints;
using paged_attention::decode_cost;
using paged_attention::kPlanHeader;
using paged_attention::kPlanVersion;

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
  check_written(op, "out", out);
  for (const auto& [arg, from] :
       {std::pair{"prefix_output", &prefix_output}, std::pair{"suffix_output", &suffix_output}})
    check_apart_or_same(op, "out", out, arg, *from);
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
  m.impl("plan_decode", TORCH_BOX(&plan_decode));
  m.impl("merge_attn_states", TORCH_BOX(&merge_attn_states));
})

}  // namespace fastinfer
