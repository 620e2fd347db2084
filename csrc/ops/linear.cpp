// linear, w8a8_linear: checks, then our kernel or torch's GEMM.
#include "../cpu/linear.h"

#include "linear_checks.h"

namespace fastinfer {
namespace {

enum class LinearPath { kernel, gemm };

// Which code computes `linear` on the CPU. Up to 16 tokens the weights are what costs, and our
// row-streaming kernel reads them once at memory speed; above, torch's GEMM has the better tiles,
// but its order of summation may depend on M, so batch-invariant calls never take it.
constexpr LinearPath choose_linear_cpu(int64_t m, bool batch_invariant) {
  return batch_invariant || m <= 16 ? LinearPath::kernel : LinearPath::gemm;
}

// torch's own GEMM, bias in its epilogue, into `out`.
void torch_linear(const Tensor& x, const Tensor& weight, const OptTensor& bias, const Tensor& out) {
  StableIValue stack[4] = {torch::stable::detail::from(x), torch::stable::detail::from(weight),
                           torch::stable::detail::from(bias), torch::stable::detail::from(out)};
  FI_CHECK(torch_call_dispatcher("aten::linear", "out", stack, TORCH_ABI_VERSION) == 0,
           "linear: torch's matrix product failed for x ", describe(x), " and weight ",
           describe(weight));
  torch::stable::detail::to<Tensor>(stack[0]);  // the alias of out it returns is ours to release
}

void linear(Tensor x, Tensor weight, OptTensor bias, bool batch_invariant, Tensor out) {
  const char* op = "linear";
  check_dtype(op, "x", x, {DType::f32, DType::f16, DType::bf16});
  check_dim(op, "x", x, 2);
  check_dim(op, "weight", weight, 2);
  const int64_t m = x.size(0), k = x.size(1), n = weight.size(0);
  check_same_dtype(op, "weight", weight, "x", x);
  check_shape(op, "weight", weight, {n, k});
  check_same_dtype(op, "out", out, "x", x);
  check_out(op, out, m, n);
  check_bias(op, bias, out, n);
  check_last_dim(op, "x", x);
  check_last_dim(op, "weight", weight);
  check_device(op, x, {{"weight", &weight}, {"bias", ptr(bias)}, {"out", &out}});
  if (m == 0 || n == 0) return;
  if (!x.is_cpu()) no_cuda_kernel(op);
  if (k > 0 && choose_linear_cpu(m, batch_invariant) == LinearPath::gemm)
    return torch_linear(x, weight, bias, out);
  const cpu::DenseParams p{
      x.const_data_ptr(),
      weight.const_data_ptr(),
      row_stride(x),
      row_stride(weight),
      dtype_of(x),
      m,
      n,
      k,
      {out.mutable_data_ptr(), row_stride(out), dtype_of(out), data(bias)},
  };
  torch::stable::parallel_for(
      0, div_up(n, cpu::kDenseBlock), grain(m * k * cpu::kDenseBlock / 8),
      [&](int64_t begin, int64_t end) { FI_PICK(linear_dense)(p, begin, end); });
}

void w8a8_linear(Tensor x_q, Tensor x_scale, Tensor weight, Tensor weight_scale, OptTensor bias,
                 OptTensor x_zeros, OptTensor weight_sum, bool /*batch_invariant*/, Tensor out,
                 OptTensor /*workspace*/) {
  const char* op = "w8a8_linear";
  check_dtype(op, "x_q", x_q, {DType::i8});
  check_dim(op, "x_q", x_q, 2);
  check_dtype(op, "weight", weight, {DType::i8});
  check_dim(op, "weight", weight, 2);
  const int64_t m = x_q.size(0), k = x_q.size(1), n = weight.size(0);
  check_shape(op, "weight", weight, {n, k});
  const auto vector = [&](const char* arg, const Tensor& t, DType dtype, int64_t size) {
    check_dtype(op, arg, t, {dtype});
    check_shape(op, arg, t, {size});
    check_contiguous(op, arg, t);
  };
  vector("x_scale", x_scale, DType::f32, m);
  vector("weight_scale", weight_scale, DType::f32, n);
  if (x_zeros) vector("x_zeros", *x_zeros, DType::i32, m);
  if (weight_sum) vector("weight_sum", *weight_sum, DType::i32, n);
  check_dtype(op, "out", out, {DType::f32, DType::f16, DType::bf16});
  check_out(op, out, m, n);
  check_bias(op, bias, out, n);
  check_last_dim(op, "x_q", x_q);
  check_last_dim(op, "weight", weight);
  check_device(op, x_q,
               {{"x_scale", &x_scale},
                {"weight", &weight},
                {"weight_scale", &weight_scale},
                {"bias", ptr(bias)},
                {"x_zeros", ptr(x_zeros)},
                {"weight_sum", ptr(weight_sum)},
                {"out", &out}});
  // |x| <= 128 and |x - zero| <= 255 against |w| <= 128.
  const int64_t limit = x_zeros ? 65793 : 131071;
  FI_CHECK(k <= limit, op, ": x_q must have at most ", limit, " columns",
           x_zeros ? " with x_zeros" : "", " for exact int32 sums, got ", k);
  if (m == 0 || n == 0) return;
  if (!x_q.is_cpu()) no_cuda_kernel(op);
  const cpu::Int8Params p{
      static_cast<const int8_t*>(x_q.const_data_ptr()),
      static_cast<const int8_t*>(weight.const_data_ptr()),
      row_stride(x_q),
      row_stride(weight),
      static_cast<const float*>(x_scale.const_data_ptr()),
      static_cast<const float*>(weight_scale.const_data_ptr()),
      static_cast<const int32_t*>(data(x_zeros)),
      static_cast<const int32_t*>(data(weight_sum)),
      m,
      n,
      k,
      {out.mutable_data_ptr(), row_stride(out), dtype_of(out), data(bias)},
  };
  torch::stable::parallel_for(
      0, div_up(n, cpu::kDenseBlock), grain(m * k * cpu::kDenseBlock / 16),
      [&](int64_t begin, int64_t end) { FI_PICK_VNNI(linear_int8)(p, begin, end); });
}

}  // namespace

FI_REGISTER_BOTH({
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("w8a8_linear", TORCH_BOX(&w8a8_linear));
})

}  // namespace fastinfer
