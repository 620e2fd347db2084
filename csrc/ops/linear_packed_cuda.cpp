// CUDA paths of int4_linear and int8_linear.
//
// Workspace: 64 KiB of counters, zeroed once by the caller and left zero by every launch, then
// partial sums, which need no clearing. Only GPUs without thread-block clusters need one.
#include "linear_checks.h"
#include "linear_choice.h"
#include "linear_dequant.h"

#ifdef FASTINFER_WITH_CUDA
#include "../cuda/common/launch.h"
#include "../cuda/linear/skinny.h"
#include "cuda_shim.h"
#endif

namespace fastinfer {

#ifdef FASTINFER_WITH_CUDA
namespace {

void check_aligned(const char* op, const char* arg, const Tensor& t) {
  FI_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, op, ": ", arg,
           " must start at a multiple of 16 bytes, got ", describe(t),
           " at another address; call .clone() on it first");
}

// `workspace` if it is large enough, else a fresh one.
Tensor workspace_of(const char* op, const OptTensor& workspace, int64_t bytes, const Tensor& x) {
  if (!workspace) return torch::stable::new_zeros(x, {(bytes + 3) / 4}, ScalarType::Int);
  check_contiguous(op, "workspace", *workspace);
  const int64_t given = workspace->numel() * static_cast<int64_t>(workspace->element_size());
  FI_CHECK(given >= bytes, op, ": workspace must have at least ", bytes,
           " bytes for this call, got ", describe(*workspace), "; pass None to have one allocated");
  return *workspace;
}

}  // namespace
#endif

void packed_linear_cuda(const char* op, const Tensor& x, const Tensor& qweight,
                        const Tensor& scales, const OptTensor& zeros, const OptTensor& bias,
                        const PackedLayout& layout, int64_t columns, int64_t groups,
                        const OptTensor& perm, bool batch_invariant, const Tensor& out,
                        const OptTensor& workspace) {
#ifdef FASTINFER_WITH_CUDA
  check_aligned(op, "qweight", qweight);
  check_aligned(op, "scales", scales);
  if (zeros) check_aligned(op, "zeros", *zeros);
  check_device(op, x, {{"workspace", ptr(workspace)}});
  const CudaLaunch launch(x);
  if (perm && validate_data()) {
    const HostCopy copy(op, "perm", *perm, launch.stream());
    check_perm_values(op, copy.data(), layout.k);
  }
  const ZeroKind zero_kind = !zeros                          ? ZeroKind::none
                             : dtype_of(*zeros) == DType::u8 ? ZeroKind::integer
                                                             : ZeroKind::floating;
#ifdef FASTINFER_HAVE_SM90A
  const int arch = cuda::force_portable() ? 80 : cuda::device_facts().compute_capability;
#else
  const int arch = 80;
#endif
  const LinearKernel kernel = choose_packed_kernel(
      {arch, dtype_of(x), layout.bits, x.size(0), layout.n, layout.k, columns, zero_kind,
       batch_invariant, layout.bits == 4 && dtype_of(scales) == dtype_of(x), perm.has_value()});
  if (kernel != LinearKernel::skinny) {
    const PackedTensors t{op, x, qweight, scales, zeros, bias, perm, out, layout, columns, groups};
    return kernel == LinearKernel::wide ? linear_wide(t) : linear_dequantise(t);
  }
  cuda::PackedLinear p{};
  p.x = x.const_data_ptr();
  p.x_stride = row_stride(x);
  p.dtype = dtype_of(x);
  p.m = x.size(0), p.n = layout.n, p.k = layout.k;
  p.qweight = static_cast<const uint32_t*>(qweight.const_data_ptr());
  p.bits = layout.bits;
  p.scales = scales.const_data_ptr(), p.scale_dtype = dtype_of(scales);
  p.zeros = data(zeros), p.zero_dtype = zeros ? dtype_of(*zeros) : DType::u8;
  p.group_columns = columns, p.groups = groups;
  p.perm = static_cast<const int32_t*>(data(perm));
  p.out = out.mutable_data_ptr();
  p.out_stride = row_stride(out);
  p.bias = data(bias);
  p.batch_invariant = batch_invariant;
  FI_CHECK(p.n <= INT32_MAX / 2 && p.k <= INT32_MAX / 64, op, ": weights of ", p.n, " x ", p.k,
           " are too large for one call");
  OptTensor scratch;
  if (const int64_t bytes = cuda::skinny_workspace(p)) {
    FI_CHECK(p.n <= 16 * 16384, op, ": out_features must be at most 262144 on this GPU, got ", p.n);
    scratch = workspace_of(op, workspace, bytes, x);
    p.workspace = scratch->mutable_data_ptr();
  }
  check_launch(op, cuda::skinny_linear(p, launch.stream()));
#else
  no_cuda_kernel(op);
#endif
}

}  // namespace fastinfer
