// rms_norm, fused_add_rms_norm, rms_norm_quant: checks, then rows in parallel.
#include "../cpu/norm.h"

#include "common.h"

namespace fastinfer {
namespace {

using cpu::RmsNormParams;
using cpu::Rows;

// Any tensor [..., D] as rows with two strides; leading dimensions must fold into [outer, inner].
struct RowView {
  int64_t rows, inner, dim;
  Rows rows_of;
};

RowView rows_of(const char* op, const char* arg, const Tensor& t, void* data) {
  const int64_t n = t.dim(), dim = t.size(n - 1);
  RowView v{t.numel() / (dim > 0 ? dim : 1), 1, dim, {data, 0, 0}};
  if (n == 1 || t.numel() == 0) return v;
  // Fold from the right into the inner extent while strides allow; what is left must fold into the
  // outer one.
  v.rows_of.inner_stride = t.stride(n - 2);
  v.inner = t.size(n - 2);
  int64_t d = n - 3;
  for (; d >= 0 && (t.size(d) == 1 || t.stride(d) == v.inner * v.rows_of.inner_stride); --d)
    v.inner *= t.size(d);
  if (d < 0) return v;
  v.rows_of.outer_stride = t.stride(d);
  int64_t outer = t.size(d);
  for (--d; d >= 0; --d) {
    FI_CHECK(t.size(d) == 1 || t.stride(d) == outer * v.rows_of.outer_stride, op, ": ", arg,
             " has strides that do not fold into two row dimensions, got ", describe(t),
             "; call .contiguous() on it first");
    outer *= t.size(d);
  }
  return v;
}

RmsNormParams params(const char* op, const Tensor& x, const Tensor& weight, double eps,
                     const Tensor* residual, const Tensor* out) {
  FI_CHECK(x.dim() >= 1, op, ": x must have at least one dimension, got ", describe(x));
  check_dtype(op, "x", x, {DType::f32, DType::f16, DType::bf16});
  const int64_t dim = x.size(x.dim() - 1);
  check_dtype(op, "weight", weight, {DType::f32, DType::f16, DType::bf16});
  check_shape(op, "weight", weight, {dim});
  check_last_dim(op, "x", x);
  check_last_dim(op, "weight", weight);
  check_device(op, x, {{"weight", &weight}, {"residual", residual}, {"out", out}});
  const RowView vx = rows_of(op, "x", x, const_cast<void*>(x.const_data_ptr()));
  RmsNormParams p{
      vx.rows_of,       {nullptr, 0, 0}, vx.rows_of, weight.const_data_ptr(), dtype_of(x),
      dtype_of(weight), vx.inner,        dim,        static_cast<float>(eps)};
  // A second tensor of x's shape may fold at another place: then both are walked with the smaller
  // inner extent.
  auto other = [&](const char* arg, const Tensor& t) {
    check_same_dtype(op, arg, t, "x", x);
    FI_CHECK(t.sizes() == x.sizes(), op, ": ", arg, " must have the shape of x (", shape_of(x),
             "), got ", describe(t));
    check_last_dim(op, arg, t);
    return rows_of(op, arg, t, t.mutable_data_ptr());
  };
  auto refold = [](RowView& v, int64_t inner) {
    if (v.inner == inner) return true;
    if (v.inner % inner != 0 || v.rows_of.outer_stride != 0) return false;
    v.rows_of.outer_stride = inner * v.rows_of.inner_stride;
    v.inner = inner;
    return true;
  };
  RowView views[3] = {vx, vx, vx};
  int count = 1;
  if (residual) views[count++] = other("residual", *residual);
  if (out) views[count++] = other("out", *out);
  int64_t inner = vx.inner;
  for (int i = 1; i < count; ++i) inner = views[i].inner < inner ? views[i].inner : inner;
  for (int i = 0; i < count; ++i)
    FI_CHECK(refold(views[i], inner), op,
             ": the strides of x, residual and out do not fold alike; call .contiguous() on one of "
             "them");
  p.inner = inner;
  p.x = views[0].rows_of;
  count = 1;
  if (residual) p.residual = views[count++].rows_of;
  p.out = out ? views[count].rows_of : p.x;
  return p;
}

void run(const char* op, const RmsNormParams& p, const Tensor& x) {
  if (x.numel() == 0) return;
  if (!x.is_cpu()) no_cuda_kernel(op);
  torch::stable::parallel_for(
      0, x.numel() / p.dim, grain(p.dim * 4),
      [&](int64_t begin, int64_t end) { FI_PICK(rms_norm)(p, begin, end); });
}

void rms_norm(Tensor x, Tensor weight, double eps, Tensor out) {
  run("rms_norm", params("rms_norm", x, weight, eps, nullptr, &out), x);
}

void fused_add_rms_norm(Tensor x, Tensor residual, Tensor weight, double eps) {
  run("fused_add_rms_norm", params("fused_add_rms_norm", x, weight, eps, &residual, &x), x);
}

}  // namespace

FI_REGISTER_BOTH({
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("fused_add_rms_norm", TORCH_BOX(&fused_add_rms_norm));
})

}  // namespace fastinfer
