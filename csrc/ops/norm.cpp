// rms_norm, fused_add_rms_norm, rms_norm_quant: checks, then rows in parallel.
//
//   x [..., D]        any outer strides; residual and out have x's shape and dtype
//   weight [D]        fp32, fp16 or bf16
//   q [..., D] int8, scale [...] fp32, zeros [...] int32: contiguous
//
// One work item is one row; the kernels (csrc/cpu/norm.cpp) take ranges of rows, the CUDA launchers
// (csrc/cuda/norm) all of them.
#include "../cpu/norm.h"

#ifdef FASTINFER_WITH_CUDA
#include "../cuda/norm/norm.h"
#include "cuda_shim.h"
#endif
#include "common.h"
#include "rows.h"

namespace fastinfer {
namespace {

using cpu::RmsNormParams;
using cpu::RmsNormQuantParams;
using cpu::Rows;

void check_like_x(const char* op, const char* arg, const Tensor& t, const Tensor& x) {
  check_same_dtype(op, arg, t, "x", x);
  FI_CHECK(t.sizes() == x.sizes(), op, ": ", arg, " must have the shape of x (", shape_of(x),
           "), got ", describe(t));
  check_written(op, arg, t);
}

RmsNormParams params(const char* op, const Tensor& x, const Tensor& weight, double eps,
                     const Tensor* residual, const Tensor* out) {
  FI_CHECK(x.dim() >= 1, op, ": x must have at least one dimension, got ", describe(x));
  check_dtype(op, "x", x, {DType::f32, DType::f16, DType::bf16});
  check_dtype(op, "weight", weight, {DType::f32, DType::f16, DType::bf16});
  check_shape(op, "weight", weight, {x.size(x.dim() - 1)});
  check_last_dim(op, "x", x);
  check_last_dim(op, "weight", weight);
  check_device(op, x, {{"weight", &weight}, {"residual", residual}, {"out", out}});
  if (residual) {
    check_like_x(op, "residual", *residual, x);
    check_apart(op, "residual", *residual, {{"x", &x}});
  }
  if (out) {
    check_like_x(op, "out", *out, x);
    check_apart_or_same(op, "out", *out, "x", x);
  }
  Rows rows[3] = {};
  RmsNormParams p{};
  p.shape = fold_rows(op, {&x, residual ? residual : &x, out ? out : &x}, rows);
  rows[0].data = const_cast<void*>(x.const_data_ptr());
  rows[1].data = residual ? residual->mutable_data_ptr() : nullptr;
  rows[2].data = out ? out->mutable_data_ptr() : nullptr;
  p.x = rows[0], p.residual = rows[1], p.out = rows[2];
  p.weight = weight.const_data_ptr();
  p.dtype = dtype_of(x), p.weight_dtype = dtype_of(weight);
  p.dim = x.size(x.dim() - 1);
  p.eps = static_cast<float>(eps);
  return p;
}

void run(const char* op, const RmsNormParams& p, const Tensor& x) {
  if (x.numel() == 0) return;
  if (!x.is_cpu()) {
    FI_CUDA(op, x, cuda::rms_norm(p, x.numel() / p.dim, stream));
    return;
  }
  torch::stable::parallel_for(
      0, x.numel() / p.dim, grain(p.dim * 4),
      [&](int64_t begin, int64_t end) { FI_PICK(rms_norm)(p, begin, end); });
}

void rms_norm(const Tensor& x, const Tensor& weight, double eps, const Tensor& out) {
  run("rms_norm", params("rms_norm", x, weight, eps, nullptr, &out), x);
}

void fused_add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  run("fused_add_rms_norm", params("fused_add_rms_norm", x, weight, eps, &residual, &x), x);
}

void rms_norm_quant(const Tensor& x, const Tensor& weight, double eps, const OptTensor& residual,
                    const Tensor& q, const Tensor& scale, const OptTensor& zeros) {
  const char* op = "rms_norm_quant";
  RmsNormQuantParams p{params(op, x, weight, eps, ptr(residual), nullptr), nullptr, nullptr,
                       nullptr};
  check_row_codes(op, x, x.size(x.dim() - 1), q, scale, ptr(zeros));
  const int64_t rows = scale.numel();
  if (rows == 0) return;
  p.q = static_cast<int8_t*>(q.mutable_data_ptr());
  p.scale = static_cast<float*>(scale.mutable_data_ptr());
  p.zeros = zeros ? static_cast<int32_t*>(zeros->mutable_data_ptr()) : nullptr;
  if (!x.is_cpu()) {
    FI_CUDA(op, x, cuda::rms_norm_quant(p, rows, stream));
    return;
  }
  torch::stable::parallel_for(0, rows, grain(p.norm.dim * 8), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(p.norm.dim));
    FI_PICK(rms_norm_quant)(p, scratch.data(), begin, end);
  });
}

}  // namespace

FI_REGISTER_BOTH({
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("fused_add_rms_norm", TORCH_BOX(&fused_add_rms_norm));
  m.impl("rms_norm_quant", TORCH_BOX(&rms_norm_quant));
})

}  // namespace fastinfer
