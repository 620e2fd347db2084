// Launcher of dequantize_weight: packed weights of either layout (csrc/ops/linear_layout.h) to a
// matrix out [n, k] (out_stride in elements):
//
//   w = (q - z) s            zeros: u8, or nullptr for the middle code (8 or 128)
//   w = (q - middle) s + zf  zeros: floating; product and sum rounded one after the other
//
// in fp32, then one rounding to out's dtype: the bits of the CPU. With perm, column c of the packed
// weight is written to column perm[c]; entries outside [0, k) are skipped. Never starts the next
// kernel early. Returns a cudaError_t.
#pragma once

#include "../../cpu/dtype.h"
#include "../../ops/linear_layout.h"

namespace fastinfer::cuda {

struct DequantizePacked {
  PackedLayout layout;
  const uint32_t* qweight;
  const void* scales;
  DType scale_dtype;  // f32, f16 or bf16
  const void* zeros;
  DType zero_dtype;
  int64_t group_columns;  // a multiple of 8, or >= k
  const int32_t* perm;    // or nullptr
  void* out;
  int64_t out_stride;
  DType out_dtype;  // f32, f16 or bf16
};

int dequantize_packed(const DequantizePacked& p, void* stream);

}  // namespace fastinfer::cuda
