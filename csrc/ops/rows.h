// Folds the leading dimensions of tensors of one shape [..., D] into the few that their strides
// need, for kernels that work row by row. Contiguous tensors end with one dimension, a [T, H, D]
// view of a fused projection with two.
#pragma once

#include <initializer_list>

#include "../cpu/rows.h"
#include "common.h"

namespace fastinfer {

// Every tensor must have the same leading sizes; `rows[i]` receives the strides of tensor i, whose
// data pointer the caller sets.
inline cpu::RowShape fold_rows(const char* op, std::initializer_list<const Tensor*> tensors,
                               cpu::Rows* rows) {
  constexpr int kMaxTensors = 4;
  const Tensor* t[kMaxTensors];
  int count = 0;
  for (const Tensor* each : tensors) t[count++] = each;
  cpu::RowShape shape{1, {1}};
  for (int i = 0; i < count; ++i) rows[i].stride[0] = 0;
  bool empty_shape = true;  // the one dimension so far is a stand-in of size 1
  for (int64_t d = 0; d + 1 < t[0]->dim(); ++d) {
    const int64_t size = t[0]->size(d);
    if (size == 1) continue;
    const int last = shape.ndim - 1;
    bool merges = !empty_shape;
    for (int i = 0; i < count && merges; ++i)
      merges = rows[i].stride[last] == size * t[i]->stride(d);
    if (merges) {
      shape.size[last] *= size;
      for (int i = 0; i < count; ++i) rows[i].stride[last] = t[i]->stride(d);
      continue;
    }
    const int at = empty_shape ? 0 : shape.ndim++;
    FI_CHECK(at < cpu::kRowDims, op, ": the strides of the inputs need more than ",
             static_cast<int>(cpu::kRowDims), " row dimensions, got x of ", describe(*t[0]),
             "; call .contiguous() on it first");
    empty_shape = false;
    shape.size[at] = size;
    for (int i = 0; i < count; ++i) rows[i].stride[at] = t[i]->stride(d);
  }
  return shape;
}

// Outputs of the quantising forms: q int8 [..., dim], scale fp32 [...], zeros int32 [...], all
// contiguous, with the leading sizes of x.
inline void check_row_codes(const char* op, const Tensor& x, int64_t dim, const Tensor& q,
                            const Tensor& scale, const Tensor* zeros) {
  check_device(op, x, {{"q", &q}, {"scale", &scale}, {"zeros", zeros}});
  const int64_t lead = x.dim() - 1;
  auto check = [&](const char* arg, const Tensor& t, DType dtype, bool has_dim) {
    check_dtype(op, arg, t, {dtype});
    bool ok = t.dim() == lead + has_dim && (!has_dim || t.size(lead) == dim);
    for (int64_t d = 0; ok && d < lead; ++d) ok = t.size(d) == x.size(d);
    FI_CHECK(ok, op, ": ", arg, " must have the leading sizes of x (", shape_of(x), ")",
             has_dim ? " and the last size " + std::to_string(dim) : std::string(), ", got ",
             describe(t));
    FI_CHECK(t.is_contiguous(), op, ": ", arg, " must be contiguous, got ", describe(t),
             "; allocate it with torch.empty");
  };
  check("q", q, DType::i8, true);
  check("scale", scale, DType::f32, false);
  if (zeros) check("zeros", *zeros, DType::i32, false);
}

}  // namespace fastinfer
