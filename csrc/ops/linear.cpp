// linear, w8a8_linear: checks, then our kernel or torch's GEMM.
#include "../cpu/linear.h"

#include "linear_checks.h"
#include "linear_dense_choice.h"
#ifdef FI_X86
#include <cpuid.h>
#endif
#ifdef FASTINFER_WITH_CUDA
#include "../cuda/common/launch.h"
#include "../cuda/linear/gemv.h"
#include "../cuda/linear/gemv_mma.h"
#include "../cuda/linear/skinny.h"
#include "../cuda/linear/w8a8.h"
#include "cuda_shim.h"
#endif

namespace fastinfer {

void torch_linear(const char* op, const Tensor& x, const Tensor& weight, const OptTensor& bias,
                  const Tensor& out) {
  StableIValue stack[4] = {torch::stable::detail::from(x), torch::stable::detail::from(weight),
                           torch::stable::detail::from(bias), torch::stable::detail::from(out)};
  FI_CHECK(torch_call_dispatcher("aten::linear", "out", stack, TORCH_ABI_VERSION) == 0, op,
           ": torch's matrix product failed for x ", describe(x), " and weight ", describe(weight));
  torch::stable::detail::to<Tensor>(stack[0]);  // the alias of out it returns is ours to release
}

namespace {

enum class LinearPath { kernel, gemm };

// Which code computes `linear` on the CPU; measured on Sapphire Rapids, 4096 x 4096.
// For few tokens the weights are what costs, and our kernel reads them once at memory speed. Above,
// torch's GEMM has the better tiles, if it has instructions for the dtype: with AMX or AVX512-BF16
// it is ahead from 5 tokens on in bf16, with AVX512-FP16 from 17 on in fp16, as in fp32; without
// them it is about 3 to 5 times slower than ours in 16 bit from 8 tokens on. Its order of summation
// may depend on M, so batch-invariant calls never take it.
constexpr LinearPath choose_linear_cpu(DType dtype, int64_t m, bool native_gemm,
                                       bool batch_invariant) {
  const int64_t most = dtype == DType::f32    ? 16
                       : !native_gemm         ? INT64_MAX
                       : dtype == DType::bf16 ? 4
                                              : 16;
  return batch_invariant || m <= most ? LinearPath::kernel : LinearPath::gemm;
}
static_assert(choose_linear_cpu(DType::f32, 16, false, false) == LinearPath::kernel);
static_assert(choose_linear_cpu(DType::f32, 17, false, false) == LinearPath::gemm);
static_assert(choose_linear_cpu(DType::f32, 17, false, true) == LinearPath::kernel);
static_assert(choose_linear_cpu(DType::bf16, 4, true, false) == LinearPath::kernel);
static_assert(choose_linear_cpu(DType::bf16, 5, true, false) == LinearPath::gemm);
static_assert(choose_linear_cpu(DType::f16, 17, true, false) == LinearPath::gemm);
static_assert(choose_linear_cpu(DType::f16, 4096, false, false) == LinearPath::kernel);

// Whether this processor multiplies 16-bit matrices of the dtype in hardware.
bool has_native_gemm(DType dtype) {
#ifdef FI_X86
  static const auto bits = [] {
    struct {
      bool bf16, f16;
    } found{false, false};
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) found.f16 = d >> 23 & 1;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) found.bf16 = a >> 5 & 1;
    return found;
  }();
  if (cpu::isa() < cpu::Isa::avx512) return false;
  return dtype == DType::bf16 ? bits.bf16 : dtype == DType::f16 && bits.f16;
#else
  return true;  // not measured elsewhere: leave larger M to torch
#endif
}

void linear_cuda(const char* op, const Tensor& x, const Tensor& weight, const OptTensor& bias,
                 bool batch_invariant, const Tensor& out) {
#ifdef FASTINFER_WITH_CUDA
  const cuda::DenseLinear p{
      x.const_data_ptr(),
      row_stride(x),
      dtype_of(x),
      x.size(0),
      weight.size(0),
      x.size(1),
      weight.const_data_ptr(),
      row_stride(weight),
      out.mutable_data_ptr(),
      row_stride(out),
      data(bias),
      batch_invariant,
  };
  const DenseCall call{p.m, p.n, p.k, cuda::programmatic_launch(), batch_invariant};
  DenseKernel kernel = choose_dense_kernel(call);
  const CudaLaunch launch(x);
  if (kernel == DenseKernel::gemv_mma) {
    if (cuda::gemv_mma_fits(p)) return check_launch(op, cuda::gemv_mma_dense(p, launch.stream()));
    kernel = choose_dense_without_mma(call);
  }
  if (kernel == DenseKernel::gemv && cuda::gemv_dense_fits(p))
    return check_launch(op, cuda::gemv_dense(p, launch.stream()));
  if (kernel == DenseKernel::skinny && cuda::skinny_dense_fits(p))
    return check_launch(op, cuda::skinny_dense(p, launch.stream()));
#endif
  FI_CHECK(!batch_invariant, op,
           ": batch_invariant on CUDA needs 16-bit x and weight rows at multiples of 16 bytes "
           "(in_features a multiple of 8), got weight ",
           describe(weight), "; torch's matrix product may sum in another order for other rows");
  torch_linear(op, x, weight, bias, out);
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
  check_apart(op, "out", out, {{"x", &x}, {"weight", &weight}, {"bias", ptr(bias)}});
  if (m == 0 || n == 0) return;
  if (!x.is_cpu()) return linear_cuda(op, x, weight, bias, batch_invariant, out);
  const DType dtype = dtype_of(x);
  if (k > 0 &&
      choose_linear_cpu(dtype, m, has_native_gemm(dtype), batch_invariant) == LinearPath::gemm)
    return torch_linear(op, x, weight, bias, out);
  const cpu::DenseParams p{
      x.const_data_ptr(),
      weight.const_data_ptr(),
      row_stride(x),
      row_stride(weight),
      dtype,
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
  check_apart(op, "out", out,
              {{"x_q", &x_q},
               {"x_scale", &x_scale},
               {"weight", &weight},
               {"weight_scale", &weight_scale},
               {"bias", ptr(bias)}});
  // |x| <= 128 and |x - zero| <= 255 against |w| <= 128.
  const int64_t limit = x_zeros ? 65793 : 131071;
  FI_CHECK(k <= limit, op, ": x_q must have at most ", limit, " columns",
           x_zeros ? " with x_zeros" : "", " for exact int32 sums, got ", k);
  if (m == 0 || n == 0) return;
  cpu::Int8Params p{
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
  if (!x_q.is_cpu()) {
    OptTensor sums;  // kept until the launches below are queued
    if (x_zeros && !weight_sum) {
      sums = torch::stable::new_empty(weight_scale, {n}, ScalarType::Int);
      int32_t* to = static_cast<int32_t*>(sums->mutable_data_ptr());
      FI_CUDA(op, x_q, cuda::row_sums(p.weight, p.weight_stride, n, k, to, stream));
      p.weight_sum = to;
    }
    FI_CUDA(op, x_q, cuda::w8a8_linear(p, stream));
    return;
  }
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
