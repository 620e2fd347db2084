// What flash_attn_fwd, flash_attn_varlen_fwd and flash_attn_kvcache share on the host: argument
// checks, the filling of AttentionParams, and on CPU the division into work items.
//
// On CPU lengths, block ids and indices are always looked at before memory is touched (it costs
// little there); CUDA looks only with FASTINFER_VALIDATE=1, with the same sentences.
#pragma once

#include <vector>

#include "../cpu/attention.h"
#include "common.h"

namespace fastinfer::attention {

// The arguments every attention operator takes.
struct Features {
  double softmax_scale;
  bool causal;
  int64_t window_left, window_right;
  double softcap;
  const OptTensor& alibi_slopes;
  const OptTensor& sinks;
  const OptTensor& k_scale;
  const OptTensor& v_scale;
};

struct Call {
  const char* op;
  cpu::AttentionParams p{};
  std::vector<cpu::AttentionSequence> sequences;
};

// A one-dimensional int32 tensor with its stride.
struct Ints {
  const int32_t* data;
  int64_t stride;
  int64_t operator[](int64_t i) const { return data[i * stride]; }
};

// int32 [size] on the device of `like`.
void check_ints(const char* op, const char* arg, const Tensor& t, int64_t size, const Tensor& like);
Ints ints(const Tensor& t);

// q, k, v (named as the caller knows them), out, lse and the features. k and v are [.., tokens,
// Hkv, D] of the same rank, 3 or 4; lse has shape `lse_shape`. Fills everything in call.p but
// page_size, q / out / lse strides and the sequences.
void setup(Call& call, const Tensor& q, const Tensor& k, const Tensor& v, const char* k_name,
           const char* v_name, const Tensor& out, const OptTensor& lse,
           std::initializer_list<int64_t> lse_shape, int64_t batch, const Features& f);

// block_table int32 [batch, max_blocks]; returns the keys a row of it can address.
int64_t check_block_table(const char* op, const Tensor& table, const Tensor& cache, int64_t batch);

// First and one past the last key that some query row of the sequence sees.
struct KeyRange {
  int64_t begin, end;
};
KeyRange visible_keys(const cpu::AttentionParams& p, const cpu::AttentionSequence& s,
                      int64_t first_token, int64_t last_token);

// Entries of sequence b's block table row for keys [begin, end) name existing blocks.
void check_blocks(const char* op, const int32_t* pages, int64_t b, int64_t begin, int64_t end,
                  int64_t page_size, int64_t num_blocks);

void check_plan(const char* op, const OptTensor& plan, const Tensor& q, int64_t batch,
                int64_t heads_kv, int64_t q_len, int64_t append);
void check_plan_header(const char* op, const int32_t* header, int64_t batch, int64_t heads_kv,
                       int64_t q_len, int64_t append);

// Runs the CPU kernel over call.sequences.
void run_cpu(Call& call);

}  // namespace fastinfer::attention
