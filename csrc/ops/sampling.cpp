// sample, verify_draft: checks, then rows in parallel. Rows are independent; a row's result depends
// on its own logits and parameters only. CPU: scratch (two floats per vocabulary entry) is taken
// once per chunk of rows. CUDA (csrc/cuda/sampling): no scratch, so `workspace` is not looked at.
#include "../cpu/sampling.h"

#include <memory>

#include "common.h"
#ifdef FASTINFER_WITH_CUDA
#include "../cuda/sampling/sampling.h"
#include "cuda_shim.h"
#endif

namespace fastinfer {
namespace {

using cpu::kGroup;
using cpu::SampleParams;
using cpu::SamplingRules;
using cpu::SamplingScratch;
using cpu::VerifyParams;

// Masses are sums of vocab integers <= 2^40 in 64 bits.
constexpr int64_t kMaxVocab = int64_t{1} << 23;

// What every argument is checked against.
struct Context {
  const char* op;
  const Tensor& logits;
  int64_t batch;

  void on_device(const char* arg, const Tensor& t) const { check_device(op, logits, {{arg, &t}}); }
  // [B] of one of the dtypes, last dimension contiguous.
  const void* per_row(const char* arg, const OptTensor& t,
                      std::initializer_list<DType> allowed) const {
    if (!t) return nullptr;
    check_dtype(op, arg, *t, allowed);
    check_shape(op, arg, *t, {batch});
    check_last_dim(op, arg, *t);
    on_device(arg, *t);
    return t->const_data_ptr();
  }
  const float* floats(const char* arg, const OptTensor& t) const {
    return static_cast<const float*>(per_row(arg, t, {DType::f32}));
  }
  void* output(const char* arg, Tensor t, DType type, std::initializer_list<int64_t> shape) const {
    check_dtype(op, arg, t, {type});
    check_shape(op, arg, t, shape);
    on_device(arg, t);
    FI_CHECK(t.is_contiguous(), op, ": ", arg, " must be contiguous, got ", describe(t),
             " with other strides; allocate it with torch.empty");
    return t.mutable_data_ptr();
  }
};

void check_logits(const char* op, const char* arg, const Tensor& t, int64_t dim) {
  check_dim(op, arg, t, dim);
  check_dtype(op, arg, t, {DType::f32, DType::f16, DType::bf16});
  check_last_dim(op, arg, t);
  const int64_t vocab = t.size(dim - 1);
  FI_CHECK(vocab >= 1 && vocab < kMaxVocab, op, ": ", arg, " must have between 1 and ",
           kMaxVocab - 1, " columns, got ", describe(t), "; pass [..., vocab] logits");
}

// What a tensor holds, on the host: for FASTINFER_VALIDATE=1.
class HostValues {
 public:
  HostValues(const char* op, const char* arg, const Tensor& t) : data_(t.const_data_ptr()) {
#ifdef FASTINFER_WITH_CUDA
    if (t.is_cpu()) return;
    const CudaLaunch device(t);
    copy_.emplace(op, arg, t, device.stream());
    data_ = copy_->data();
#else
    if (!t.is_cpu()) no_cuda_kernel(op);
#endif
  }
  const void* data() const { return data_; }

 private:
  const void* data_;
#ifdef FASTINFER_WITH_CUDA
  std::optional<HostCopy> copy_;
#endif
};

template <class Ok>
void check_values(const char* op, const char* arg, const OptTensor& t, Ok ok, const char* want) {
  if (!t) return;
  const HostValues values(op, arg, *t);
  const float* value = static_cast<const float*>(values.data());
  for (int64_t i = 0; i < t->numel(); ++i)
    FI_CHECK(ok(value[i]), op, ": ", arg, " must be ", want, ", got ", value[i], " in row ", i,
             "; correct that row");
}

SamplingRules rules_of(const Context& c, const OptTensor& temperature, const OptTensor& top_k,
                       const OptTensor& top_p, const OptTensor& min_p, const OptTensor& seeds,
                       const OptTensor& steps) {
  SamplingRules rules{};
  rules.temperature = c.floats("temperature", temperature);
  rules.top_k = c.per_row("top_k", top_k, {DType::i32, DType::i64});
  rules.top_k_type = top_k ? dtype_of(*top_k) : DType::i32;
  rules.top_p = c.floats("top_p", top_p);
  rules.min_p = c.floats("min_p", min_p);
  rules.seeds = static_cast<const int64_t*>(c.per_row("seeds", seeds, {DType::i64}));
  rules.steps = static_cast<const int64_t*>(c.per_row("steps", steps, {DType::i64}));
  if (validate_data()) {
    const auto unit = [](float v) { return v >= 0.0f && v <= 1.0f; };
    check_values(c.op, "temperature", temperature, [](float v) { return v >= 0.0f; }, ">= 0");
    check_values(c.op, "top_p", top_p, unit, "between 0 and 1");
    check_values(c.op, "min_p", min_p, unit, "between 0 and 1");
  }
  return rules;
}

// Rows [0, batch) in chunks, each chunk with scratch of its own.
template <class Run>
void for_rows(int64_t batch, int64_t vocab, int64_t num_top, Run run) {
  const int64_t groups = (vocab + kGroup - 1) / kGroup, padded = groups * kGroup;
  torch::stable::parallel_for(0, batch, grain(vocab), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> floats(new float[4 * padded + groups + 16]);
    const std::unique_ptr<uint64_t[]> best(new uint64_t[num_top + 1]);
    float* f = floats.get();
    const SamplingScratch scratch{
        f, f + padded, f + 2 * padded, f + 3 * padded, f + 4 * padded, best.get()};
    run(scratch, begin, end);
  });
}

void sample(Tensor logits, OptTensor temperature, OptTensor top_k, OptTensor top_p, OptTensor min_p,
            OptTensor seeds, OptTensor steps, OptTensor repetition_penalty,
            OptTensor presence_penalty, OptTensor frequency_penalty, OptTensor prompt_mask,
            OptTensor output_counts, Tensor token_ids, OptTensor logprobs, OptTensor top_ids,
            OptTensor top_logprobs, OptTensor workspace) {
  const char* op = "sample";
  check_logits(op, "logits", logits, 2);
  const int64_t batch = logits.size(0), vocab = logits.size(1);
  const Context c{op, logits, batch};
  SampleParams p{};
  p.logits = logits.const_data_ptr();
  p.dtype = dtype_of(logits);
  p.row_stride = logits.stride(0);
  p.vocab = vocab;
  p.rules = rules_of(c, temperature, top_k, top_p, min_p, seeds, steps);

  p.repetition = c.floats("repetition_penalty", repetition_penalty);
  p.presence = c.floats("presence_penalty", presence_penalty);
  p.frequency = c.floats("frequency_penalty", frequency_penalty);
  FI_CHECK(!repetition_penalty || prompt_mask || output_counts, op,
           ": repetition_penalty must come with prompt_mask or output_counts, got neither; pass "
           "the tokens it applies to");
  FI_CHECK(!(presence_penalty || frequency_penalty) || output_counts, op, ": ",
           presence_penalty ? "presence_penalty" : "frequency_penalty",
           " must come with output_counts, got None; pass how often each token was generated");
  if (prompt_mask) {
    check_dtype(op, "prompt_mask", *prompt_mask, {DType::boolean});
    check_shape(op, "prompt_mask", *prompt_mask, {batch, vocab});
    check_last_dim(op, "prompt_mask", *prompt_mask);
    c.on_device("prompt_mask", *prompt_mask);
    p.prompt_mask = static_cast<const uint8_t*>(prompt_mask->const_data_ptr());
    p.mask_stride = prompt_mask->stride(0);
  }
  if (output_counts) {
    check_dtype(op, "output_counts", *output_counts, {DType::i32});
    check_shape(op, "output_counts", *output_counts, {batch, vocab});
    check_last_dim(op, "output_counts", *output_counts);
    c.on_device("output_counts", *output_counts);
    p.output_counts = static_cast<const int32_t*>(output_counts->const_data_ptr());
    p.counts_stride = output_counts->stride(0);
  }
  if (validate_data())
    check_values(
        op, "repetition_penalty", repetition_penalty, [](float v) { return v > 0.0f; }, "> 0");

  p.token_ids = static_cast<int64_t*>(c.output("out", token_ids, DType::i64, {batch}));
  if (logprobs)
    p.logprobs = static_cast<float*>(c.output("logprobs", *logprobs, DType::f32, {batch}));
  FI_CHECK(top_ids.has_value() == top_logprobs.has_value(), op,
           ": top_ids and top_logprobs must be given together, got one of them; pass both");
  if (top_ids) {
    p.num_top = top_ids->dim() == 2 ? top_ids->size(1) : 0;
    FI_CHECK(p.num_top <= vocab, op, ": num_top_logprobs must be at most the vocabulary size (",
             vocab, "), got ", p.num_top, "; ask for fewer");
    p.top_ids =
        static_cast<int64_t*>(c.output("top_ids", *top_ids, DType::i64, {batch, p.num_top}));
    p.top_logprobs = static_cast<float*>(
        c.output("top_logprobs", *top_logprobs, DType::f32, {batch, p.num_top}));
  }
  if (batch == 0) return;
  if (!logits.is_cpu()) {
    FI_CUDA(op, logits, cuda::launch_sample(p, batch, stream));
    return;
  }
  for_rows(batch, vocab, p.num_top, [&](const SamplingScratch& s, int64_t begin, int64_t end) {
    FI_PICK(sample_rows)(p, s, begin, end);
  });
}

void check_drafts(const char* op, const Tensor& draft_ids, const OptTensor& counts, int64_t vocab) {
  const int64_t batch = draft_ids.size(0), k = draft_ids.size(1);
  const DType type = dtype_of(draft_ids);
  const HostValues ids(op, "draft_token_ids", draft_ids);
  std::optional<HostValues> numbers;
  if (counts) numbers.emplace(op, "num_draft_tokens", *counts);
  for (int64_t b = 0; b < batch; ++b) {
    int64_t n = k;
    if (counts) {
      n = index_at(numbers->data(), dtype_of(*counts), b);
      FI_CHECK(n >= 0 && n <= k, op, ": num_draft_tokens must be between 0 and ", k, ", got ", n,
               " in row ", b, "; correct that row");
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t id =
          index_at(ids.data(), type, b * draft_ids.stride(0) + i * draft_ids.stride(1));
      FI_CHECK(id >= 0 && id < vocab, op, ": draft_token_ids must be between 0 and ", vocab - 1,
               ", got ", id, " in row ", b, "; drop the drafts from there on");
    }
  }
}

void verify_draft(Tensor target_logits, Tensor draft_token_ids, OptTensor draft_probs,
                  OptTensor num_draft_tokens, OptTensor temperature, OptTensor top_k,
                  OptTensor top_p, OptTensor min_p, OptTensor seeds, OptTensor steps,
                  Tensor token_ids, Tensor num_accepted, OptTensor workspace) {
  const char* op = "verify_draft";
  check_logits(op, "target_logits", target_logits, 3);
  const int64_t batch = target_logits.size(0), k = target_logits.size(1) - 1,
                vocab = target_logits.size(2);
  FI_CHECK(k >= 0, op, ": target_logits must be [B, k + 1, V] with k >= 0, got ",
           describe(target_logits), "; it holds one position more than there are drafts");
  const Context c{op, target_logits, batch};
  VerifyParams p{};
  p.logits = target_logits.const_data_ptr();
  p.dtype = dtype_of(target_logits);
  p.batch_stride = target_logits.stride(0);
  p.position_stride = target_logits.stride(1);
  p.vocab = vocab;
  p.num_drafts = k;

  check_dtype(op, "draft_token_ids", draft_token_ids, {DType::i64, DType::i32});
  check_shape(op, "draft_token_ids", draft_token_ids, {batch, k});
  check_last_dim(op, "draft_token_ids", draft_token_ids);
  c.on_device("draft_token_ids", draft_token_ids);
  p.draft_ids = draft_token_ids.const_data_ptr();
  p.draft_type = dtype_of(draft_token_ids);
  p.draft_stride = draft_token_ids.stride(0);
  if (draft_probs) {
    check_dtype(op, "draft_probs", *draft_probs, {DType::f32});
    check_shape(op, "draft_probs", *draft_probs, {batch, k, vocab});
    check_last_dim(op, "draft_probs", *draft_probs);
    c.on_device("draft_probs", *draft_probs);
    p.draft_probs = static_cast<const float*>(draft_probs->const_data_ptr());
    p.probs_batch_stride = draft_probs->stride(0);
    p.probs_position_stride = draft_probs->stride(1);
  }
  p.num_draft_tokens = c.per_row("num_draft_tokens", num_draft_tokens, {DType::i32, DType::i64});
  p.num_type = num_draft_tokens ? dtype_of(*num_draft_tokens) : DType::i32;
  p.rules = rules_of(c, temperature, top_k, top_p, min_p, seeds, steps);
  p.token_ids = static_cast<int64_t*>(c.output("token_ids", token_ids, DType::i64, {batch, k + 1}));
  p.num_accepted =
      static_cast<int32_t*>(c.output("num_accepted", num_accepted, DType::i32, {batch}));
  if (validate_data()) check_drafts(op, draft_token_ids, num_draft_tokens, vocab);
  if (batch == 0) return;
  if (!target_logits.is_cpu()) {
    FI_CUDA(op, target_logits, cuda::launch_verify_draft(p, batch, stream));
    return;
  }
  for_rows(batch, vocab, 0, [&](const SamplingScratch& s, int64_t begin, int64_t end) {
    FI_PICK(verify_rows)(p, s, begin, end);
  });
}

}  // namespace

FI_REGISTER_BOTH({
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("verify_draft", TORCH_BOX(&verify_draft));
})

}  // namespace fastinfer
