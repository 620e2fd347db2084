// CPU kernels of csrc/ops/sampling.cpp over ranges of batch rows. Pointers may be null where an
// argument is optional; strides are in elements; per-row parameters have stride 1.
#pragma once

#include "dtype.h"
#include "isa.h"

namespace fastinfer::cpu {

struct SamplingRules {
  const float *temperature, *top_p, *min_p;  // [B]
  const void* top_k;                         // [B], int32 or int64
  DType top_k_type;
  const int64_t *seeds, *steps;  // [B]
};

struct SampleParams {
  const void* logits;  // [B, V]
  DType dtype;
  int64_t row_stride, vocab;
  SamplingRules rules;
  const float *repetition, *presence, *frequency;  // [B]
  const uint8_t* prompt_mask;                      // [B, V]
  int64_t mask_stride;
  const int32_t* output_counts;  // [B, V]
  int64_t counts_stride;
  int64_t* token_ids;   // [B]
  float* logprobs;      // [B]
  int64_t* top_ids;     // [B, num_top]
  float* top_logprobs;  // [B, num_top]
  int64_t num_top;
};

struct VerifyParams {
  const void* logits;  // [B, k + 1, V]
  DType dtype;
  int64_t batch_stride, position_stride, vocab, num_drafts;  // num_drafts = k
  SamplingRules rules;
  const void* draft_ids;  // [B, k]
  DType draft_type;
  int64_t draft_stride;
  const float* draft_probs;  // [B, k, V] or null: one-hot
  int64_t probs_batch_stride, probs_position_stride;
  const void* num_draft_tokens;  // [B] or null: k
  DType num_type;
  int64_t* token_ids;     // [B, k + 1]
  int32_t* num_accepted;  // [B]
};

// A row is processed in groups of kGroup tokens; scratch holds logits and weights padded to whole
// groups, the groups' maxima (a whole number of vectors of them), room for a list of as many logits
// and weights, and one word per top token.
constexpr int64_t kGroup = 64;

struct SamplingScratch {
  float *logits, *weights, *list_logits, *list_weights, *group_max;
  uint64_t* best;
};

}  // namespace fastinfer::cpu

FI_DECLARE_KERNEL(sample_rows, const SampleParams& p, const SamplingScratch& scratch, int64_t begin,
                  int64_t end)
FI_DECLARE_KERNEL(verify_rows, const VerifyParams& p, const SamplingScratch& scratch, int64_t begin,
                  int64_t end)
