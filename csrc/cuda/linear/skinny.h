// Launchers for few tokens (skinny.cuh). Tokens beyond kSkinnyTokens run in launches of that many:
// every launch reads all weights. Each returns a cudaError_t.
#pragma once

#include "packed_linear.h"

namespace fastinfer::cuda {

// 16-bit W [N, K], rows of any stride that is a multiple of 16 bytes.
struct DenseLinear {
  const void* x;
  int64_t x_stride;
  DType dtype;  // of everything: f16 or bf16
  int64_t m, n, k;
  const void* w;
  int64_t w_stride;
  void* out;
  int64_t out_stride;
  const void* bias;  // [N] or nullptr
  bool batch_invariant;
};

int skinny_linear_int4(const PackedLinear& p, void* stream);
int skinny_linear_int8(const PackedLinear& p, void* stream);

// 4-bit weights and up to kDirectTokens tokens without a ring (direct.cuh).
constexpr int kDirectTokens = 8;
bool direct_fits(const PackedLinear& p);
int direct_linear(const PackedLinear& p, void* stream);

inline int skinny_linear(const PackedLinear& p, void* stream) {
  return p.bits == 4 ? skinny_linear_int4(p, stream) : skinny_linear_int8(p, stream);
}
// Bytes of `workspace` that skinny_linear needs; 0: none.
int64_t skinny_workspace_int4(const PackedLinear& p);
int64_t skinny_workspace_int8(const PackedLinear& p);
inline int64_t skinny_workspace(const PackedLinear& p) {
  return p.bits == 4 ? skinny_workspace_int4(p) : skinny_workspace_int8(p);
}

// Whether the kernel can run these shapes and strides at all.
bool skinny_dense_fits(const DenseLinear& p);
int skinny_dense(const DenseLinear& p, void* stream);

}  // namespace fastinfer::cuda
