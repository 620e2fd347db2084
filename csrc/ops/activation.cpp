// silu_and_mul, gelu_and_mul, silu_and_mul_quant: checks, then column tiles of rows in parallel
// (rows, for the quantising form).
//
//   x [..., 2I] = [gate, up], any outer strides; out [..., I] of x's dtype
//   q [..., I] int8, scale [...] fp32, zeros [...] int32: contiguous
#include "../cpu/activation.h"

#ifdef FASTINFER_WITH_CUDA
#include "../cuda/activation/activation.h"
#include "cuda_shim.h"
#endif
#include "common.h"
#include "rows.h"

namespace fastinfer {
namespace {

using cpu::Activation;
using cpu::GatedParams;
using cpu::GatedQuantParams;
using cpu::Rows;

int64_t check_x(const char* op, const Tensor& x) {
  check_dtype(op, "x", x, {DType::f32, DType::f16, DType::bf16});
  FI_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) % 2 == 0, op,
           ": x must have shape [..., 2I] with the gate in its first and the linear part in its "
           "second half, got ",
           describe(x), "; concatenate the two along the last dimension");
  check_last_dim(op, "x", x);
  return x.size(x.dim() - 1) / 2;
}

void gated(const char* op, const Tensor& x, Activation activation, const Tensor& out) {
  GatedParams p{};
  p.inner = check_x(op, x);
  check_device(op, x, {{"out", &out}});
  check_same_dtype(op, "out", out, "x", x);
  bool same = out.dim() == x.dim() && out.size(x.dim() - 1) == p.inner;
  for (int64_t d = 0; same && d + 1 < x.dim(); ++d) same = out.size(d) == x.size(d);
  FI_CHECK(same, op, ": out must have the shape of x (", shape_of(x),
           ") with the last size halved, got ", describe(out));
  check_written(op, "out", out);
  check_apart(op, "out", out, {{"x", &x}});
  if (out.numel() == 0) return;
  Rows rows[2] = {};
  p.shape = fold_rows(op, {&x, &out}, rows);
  rows[0].data = const_cast<void*>(x.const_data_ptr());
  rows[1].data = out.mutable_data_ptr();
  p.x = rows[0], p.out = rows[1];
  p.dtype = dtype_of(x);
  p.activation = activation;
  if (!x.is_cpu()) {
    FI_CUDA(op, x, cuda::gated_activation(p, out.numel() / p.inner, stream));
    return;
  }
  const int64_t tiles = (p.inner + cpu::kActivationTile - 1) / cpu::kActivationTile;
  const int64_t cost = 8 * (p.inner < cpu::kActivationTile ? p.inner : cpu::kActivationTile);
  torch::stable::parallel_for(
      0, out.numel() / p.inner * tiles, grain(cost),
      [&](int64_t begin, int64_t end) { FI_PICK(gated_activation)(p, begin, end); });
}

void silu_and_mul(const Tensor& x, const Tensor& out) {
  gated("silu_and_mul", x, Activation::silu, out);
}

void gelu_and_mul(const Tensor& x, bool tanh_approximation, const Tensor& out) {
  gated("gelu_and_mul", x, tanh_approximation ? Activation::gelu_tanh : Activation::gelu_erf, out);
}

void silu_and_mul_quant(const Tensor& x, const Tensor& q, const Tensor& scale,
                        const OptTensor& zeros) {
  const char* op = "silu_and_mul_quant";
  GatedQuantParams p{};
  p.gated.inner = check_x(op, x);
  check_row_codes(op, x, p.gated.inner, q, scale, ptr(zeros));
  const int64_t rows = scale.numel();
  if (rows == 0) return;
  p.gated.shape = fold_rows(op, {&x}, &p.gated.x);
  p.gated.x.data = const_cast<void*>(x.const_data_ptr());
  p.gated.dtype = dtype_of(x);
  p.gated.activation = Activation::silu;
  p.q = static_cast<int8_t*>(q.mutable_data_ptr());
  p.scale = static_cast<float*>(scale.mutable_data_ptr());
  p.zeros = zeros ? static_cast<int32_t*>(zeros->mutable_data_ptr()) : nullptr;
  if (!x.is_cpu()) {
    FI_CUDA(op, x, cuda::silu_and_mul_quant(p, rows, stream));
    return;
  }
  torch::stable::parallel_for(0, rows, grain(p.gated.inner * 12), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(p.gated.inner));
    FI_PICK(silu_and_mul_quant)(p, scratch.data(), begin, end);
  });
}

}  // namespace

FI_REGISTER_BOTH({
  m.impl("silu_and_mul", TORCH_BOX(&silu_and_mul));
  m.impl("gelu_and_mul", TORCH_BOX(&gelu_and_mul));
  m.impl("silu_and_mul_quant", TORCH_BOX(&silu_and_mul_quant));
})

}  // namespace fastinfer
