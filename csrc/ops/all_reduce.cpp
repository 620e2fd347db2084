// peer_all_reduce, peer_all_reduce_add_rms_norm, peer_argmax: checks, the choice between one-shot
// and two-shot, launch. CUDA only: what the ranks share is GPU memory (csrc/cuda/all_reduce); on
// the CPU, torch.distributed does it.
//
//   x, residual [..., D]  one row stride, last dimension contiguous; both are written
//   weight [D]            fp32, fp16 or bf16
//   group                 number of a connected PeerGroup on x's device
//   algorithm             0: by size, 1: one-shot, 2: two-shot
//   logits [B, N]         rows of which ids [B] says the greatest; out [B] is written
#ifdef FASTINFER_WITH_CUDA
#include "../cuda/all_reduce/all_reduce.h"

#include "../cuda/norm/norm.h"
#include "cuda_shim.h"
#endif
#include "all_reduce_choice.h"
#include "common.h"
#include "rows.h"

namespace fastinfer {
namespace {

void check_x(const char* op, const Tensor& x, int64_t algorithm) {
  FI_CHECK(x.dim() >= 1, op, ": x must have at least one dimension, got ", describe(x));
  check_dtype(op, "x", x, {DType::f32, DType::f16, DType::bf16});
  check_last_dim(op, "x", x);
  check_written(op, "x", x);
  FI_CHECK(algorithm >= 0 && algorithm <= 2, op,
           ": algorithm must be 0 (by size), 1 (one-shot) or 2 (two-shot), got ", algorithm);
  FI_CHECK(!x.is_cpu(), op, ": x must be on a CUDA device, got ", describe(x),
           "; on the CPU use torch.distributed.all_reduce");
}

void check_add_norm(const char* op, const Tensor& x, const Tensor& residual, const Tensor& weight) {
  check_dtype(op, "weight", weight, {DType::f32, DType::f16, DType::bf16});
  check_shape(op, "weight", weight, {x.size(x.dim() - 1)});
  check_last_dim(op, "weight", weight);
  check_device(op, x, {{"residual", &residual}, {"weight", &weight}});
  check_same_dtype(op, "residual", residual, "x", x);
  FI_CHECK(residual.sizes() == x.sizes(), op, ": residual must have the shape of x (", shape_of(x),
           "), got ", describe(residual));
  check_last_dim(op, "residual", residual);
  check_written(op, "residual", residual);
}

#ifdef FASTINFER_WITH_CUDA
const cuda::PeerGroup& group_of(const char* op, const Tensor& x, int64_t id) {
  const cuda::PeerGroup* group = cuda::peer_group(id);
  FI_CHECK(group && group->connected, op, ": group ", id,
           " is not connected (or closed); make a fastinfer.distributed PeerAllReduce");
  FI_CHECK(group->device == x.get_device_index(), op,
           ": x must be on the group's device cuda:", group->device, ", got ", describe(x));
  return *group;
}

// The rows of x (residual): contiguous data counts as one row where `flat`.
cuda::AllReduceParams params(const char* op, const cuda::PeerGroup& group, const Tensor& x,
                             int64_t algorithm, const cpu::RowShape& shape, const cpu::Rows& rows,
                             bool flat) {
  FI_CHECK(shape.ndim == 1, op, ": x must have one row stride, got ", describe(x),
           " with several; call .contiguous() on it first");
  cuda::AllReduceParams p{};
  p.group = &group;
  p.x = x.mutable_data_ptr();
  p.dtype = dtype_of(x);
  p.dim = x.size(x.dim() - 1), p.rows = shape.size[0], p.stride = rows.stride[0];
  if (flat && (p.rows == 1 || p.stride == p.dim)) p.dim *= p.rows, p.rows = 1, p.stride = p.dim;
  const int64_t bytes = cuda::all_reduce_slot_bytes(p.rows, p.dim, p.dtype);
  FI_CHECK(bytes <= group.slot_bytes, op, ": x must fit the group's max_bytes, ", group.slot_bytes,
           ", got ", bytes, " bytes (", describe(x),
           "); use torch.distributed.all_reduce, or a larger max_bytes");
  p.two_shot = algorithm == 2 || (algorithm == 0 && all_reduce_two_shot(group.world, bytes));
  return p;
}
#endif

void peer_all_reduce(const Tensor& x, int64_t group_id, int64_t algorithm) {
  const char* op = "peer_all_reduce";
  check_x(op, x, algorithm);
#ifdef FASTINFER_WITH_CUDA
  const cuda::PeerGroup& group = group_of(op, x, group_id);
  cpu::Rows rows[1] = {};
  const cpu::RowShape shape = fold_rows(op, {&x}, rows);
  if (x.numel() == 0 || group.world == 1) return;
  const cuda::AllReduceParams p = params(op, group, x, algorithm, shape, rows[0], true);
  FI_CUDA(op, x, cuda::all_reduce(p, stream));
#else
  no_cuda_kernel(op);
#endif
}

void peer_all_reduce_add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                  double eps, int64_t group_id, int64_t algorithm) {
  const char* op = "peer_all_reduce_add_rms_norm";
  check_x(op, x, algorithm);
  check_add_norm(op, x, residual, weight);
#ifdef FASTINFER_WITH_CUDA
  const cuda::PeerGroup& group = group_of(op, x, group_id);
  cpu::Rows rows[2] = {};
  cpu::RmsNormParams norm{};
  norm.shape = fold_rows(op, {&x, &residual}, rows);
  if (x.numel() == 0) return;
  norm.x = norm.out = {x.mutable_data_ptr(), {}};
  norm.residual = {residual.mutable_data_ptr(), {}};
  for (int d = 0; d < norm.shape.ndim; ++d) {
    norm.x.stride[d] = norm.out.stride[d] = rows[0].stride[d];
    norm.residual.stride[d] = rows[1].stride[d];
  }
  norm.weight = weight.const_data_ptr();
  norm.dtype = dtype_of(x), norm.weight_dtype = dtype_of(weight);
  norm.dim = x.size(x.dim() - 1), norm.eps = static_cast<float>(eps);
  const int64_t count = x.numel() / norm.dim;
  if (group.world > 1) {
    cuda::AllReduceParams p = params(op, group, x, algorithm, norm.shape, rows[0], false);
    const cuda::AddNormParams n{norm.residual.data, rows[1].stride[0], norm.weight, norm.eps};
    if (norm.weight_dtype == norm.dtype && cuda::all_reduce_norm_fits(p, n)) {
      FI_CUDA(op, x, cuda::all_reduce_add_rms_norm(p, n, stream));
      return;
    }
    FI_CUDA(op, x, cuda::all_reduce(p, stream));
  }
  FI_CUDA(op, x, cuda::rms_norm(norm, count, stream));
#else
  no_cuda_kernel(op);
#endif
}

void peer_argmax(const Tensor& logits, const Tensor& ids, int64_t begin, int64_t group_id,
                 const Tensor& out) {
  const char* op = "peer_argmax";
  check_dim(op, "logits", logits, 2);
  check_dtype(op, "logits", logits, {DType::f32, DType::f16, DType::bf16});
  const int64_t rows = logits.size(0), columns = logits.size(1);
  for (const auto& [name, tensor] : {std::pair{"ids", &ids}, std::pair{"out", &out}}) {
    check_dtype(op, name, *tensor, {DType::i64});
    check_shape(op, name, *tensor, {rows});
    check_last_dim(op, name, *tensor);
  }
  if (columns > 0) check_last_dim(op, "logits", logits);
  check_written(op, "out", out);
  check_device(op, logits, {{"ids", &ids}, {"out", &out}});
  FI_CHECK(begin >= 0 && begin + columns < (int64_t{1} << 31), op,
           ": begin must be >= 0, and begin + columns of logits below 2^31, got ", begin);
  FI_CHECK(!logits.is_cpu(), op, ": logits must be on a CUDA device, got ", describe(logits),
           "; on the CPU use torch.distributed");
#ifdef FASTINFER_WITH_CUDA
  const cuda::PeerGroup& group = group_of(op, logits, group_id);
  if (rows == 0) return;
  cuda::PeerArgmaxParams p{};
  p.group = &group, p.logits = logits.const_data_ptr(), p.dtype = dtype_of(logits);
  p.rows = rows, p.columns = columns, p.stride = logits.stride(0), p.begin = begin;
  p.ids = static_cast<const int64_t*>(ids.const_data_ptr());
  p.out = static_cast<int64_t*>(out.mutable_data_ptr());
  FI_CHECK(rows <= cuda::peer_argmax_rows(group), op, ": logits must have at most ",
           cuda::peer_argmax_rows(group), " rows, got ", describe(logits));
  FI_CUDA(op, logits, cuda::peer_argmax(p, stream));
#else
  no_cuda_kernel(op);
#endif
}

}  // namespace

FI_REGISTER_BOTH({
  m.impl("peer_argmax", TORCH_BOX(&peer_argmax));
  m.impl("peer_all_reduce", TORCH_BOX(&peer_all_reduce));
  m.impl("peer_all_reduce_add_rms_norm", TORCH_BOX(&peer_all_reduce_add_rms_norm));
})

}  // namespace fastinfer
