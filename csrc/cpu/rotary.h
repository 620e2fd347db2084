// CPU kernel of csrc/ops/rotary.cpp over ranges of tokens. Token t is (t / seq, t % seq) of [B, S,
// H, D]; packed tokens [T, H, D] are B = 1. All strides are in elements.
#pragma once

#include "dtype.h"
#include "isa.h"

namespace fastinfer::cpu {

struct RotaryTensor {
  const void* in;  // nullptr: absent
  void* out;       // may be `in`
  int64_t in_batch, in_token, in_head, out_batch, out_token, out_head;
  int64_t heads;
};

struct RotaryParams {
  RotaryTensor q, k;
  const void *cos, *sin;  // [max_pos, half]
  int64_t cos_stride, sin_stride;
  const void* positions;  // nullptr: the token's index in its sequence
  int64_t position_batch, position_token;
  DType dtype, table_dtype, position_dtype;
  int64_t seq, dim, half;  // half = rotary_dim / 2
  bool interleaved;
};

}  // namespace fastinfer::cpu

FI_DECLARE_KERNEL(rotary, const RotaryParams& p, int64_t begin, int64_t end)
