// Checks shared by csrc/ops/linear*.cpp.
#pragma once

#include "common.h"
#include "linear_layout.h"

namespace fastinfer {

inline void check_group_size(const char* op, int64_t group_size) {
  FI_CHECK(
      group_size == -1 || (group_size > 0 && group_size % 8 == 0), op,
      ": group_size must be -1 (one group per output channel) or a positive multiple of 8, got ",
      group_size);
}

inline void check_bits(const char* op, int64_t bits) {
  FI_CHECK(bits == 4 || bits == 8, op, ": bits must be 4 or 8, got ", bits);
}

inline void check_contiguous(const char* op, const char* arg, const Tensor& t) {
  FI_CHECK(t.is_contiguous(), op, ": ", arg, " must be contiguous, got ", describe(t),
           "; call .contiguous() on it first");
}

// bias [n] of out's dtype.
inline void check_bias(const char* op, const OptTensor& bias, const Tensor& out, int64_t n) {
  if (!bias) return;
  check_same_dtype(op, "bias", *bias, "out", out);
  check_shape(op, "bias", *bias, {n});
  check_last_dim(op, "bias", *bias);
}

// out [m, n], any row stride.
inline void check_out(const char* op, const Tensor& out, int64_t m, int64_t n) {
  check_shape(op, "out", out, {m, n});
  check_written(op, "out", out);
}

// torch's own matrix product, bias in its epilogue, into `out` (linear.cpp).
void torch_linear(const char* op, const Tensor& x, const Tensor& weight, const OptTensor& bias,
                  const Tensor& out);

// The values of perm int32 [k], on the host.
void check_perm_values(const char* op, const void* host, int64_t k);
// perm int32 [k]; on the CPU its values are looked at when `values` is true.
void check_perm(const char* op, const OptTensor& perm, int64_t k, bool values);

// qweight, scales, zeros as pack_weight makes them for [n, k]; returns their layout.
PackedLayout check_packed(const char* op, const Tensor& qweight, const Tensor& scales,
                          const OptTensor& zeros, int bits, int64_t group_size, int64_t n,
                          int64_t k);

// int4_linear and int8_linear on CUDA, arguments checked, nothing empty but K
// (linear_packed_cuda.cpp).
void packed_linear_cuda(const char* op, const Tensor& x, const Tensor& qweight,
                        const Tensor& scales, const OptTensor& zeros, const OptTensor& bias,
                        const PackedLayout& layout, int64_t columns, int64_t groups,
                        const OptTensor& perm, bool batch_invariant, const Tensor& out,
                        const OptTensor& workspace);

inline int64_t row_stride(const Tensor& t) { return t.size(0) > 1 ? t.stride(0) : 0; }

}  // namespace fastinfer
