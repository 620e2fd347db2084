// The paths of int4_linear and int8_linear for many tokens on CUDA: the wgmma kernel, or weights
// dequantised to a scratch tensor and torch's matrix product. Arguments are checked already.
#pragma once

#ifdef FASTINFER_WITH_CUDA
#include "linear_checks.h"

namespace fastinfer {

struct PackedTensors {
  const char* op;
  const Tensor &x, &qweight, &scales;
  const OptTensor &zeros, &bias, &perm;
  const Tensor& out;
  const PackedLayout& layout;
  int64_t group_columns, groups;
};

// Any dtype of x, group size, zeros, perm, strides.
void linear_dequantise(const PackedTensors& t);
// 16-bit x; see linear_choice.h for what it takes.
void linear_wide(const PackedTensors& t);

}  // namespace fastinfer
#endif
