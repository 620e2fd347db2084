// See linear_dequant.h. Scratch comes from torch's allocator, so that graphs may capture it.
#ifdef FASTINFER_WITH_CUDA
#include "linear_dequant.h"

#include "../cuda/common/launch.h"
#include "../cuda/linear/dequantize.h"
#include "../cuda/linear/wide.h"
#include "cuda_shim.h"
#include "linear_choice.h"

namespace fastinfer {
namespace {

// x with its columns in the packed order, rows padded to 16 bytes.
Tensor gathered(const PackedTensors& t, void* stream) {
  const int64_t m = t.x.size(0), k = t.x.size(1), padded = div_up(k, 8) * 8;
  Tensor to = torch::stable::new_empty(t.x, {m, padded});
  check_launch(t.op, cuda::gather_columns(t.x.const_data_ptr(), row_stride(t.x), m, k,
                                          static_cast<const int32_t*>(data(t.perm)),
                                          to.mutable_data_ptr(), padded, stream));
  return to;
}

}  // namespace

void linear_dequantise(const PackedTensors& t) {
  const Tensor weight = torch::stable::new_empty(t.x, {t.layout.n, t.layout.k});
  const cuda::DequantizePacked p{
      t.layout,
      static_cast<const uint32_t*>(t.qweight.const_data_ptr()),
      t.scales.const_data_ptr(),
      dtype_of(t.scales),
      data(t.zeros),
      t.zeros ? dtype_of(*t.zeros) : DType::other,
      t.group_columns,
      static_cast<const int32_t*>(data(t.perm)),
      weight.mutable_data_ptr(),
      t.layout.k,
      dtype_of(t.x),
  };
  const CudaLaunch device(t.x);
  check_launch(t.op, cuda::dequantize_packed(p, device.stream()));
  torch_linear(t.op, t.x, weight, t.bias, t.out);
}

void linear_wide(const PackedTensors& t) {
  const CudaLaunch device(t.x);
  const int64_t m = t.x.size(0), stride = row_stride(t.x);
  const bool suits =
      !t.perm && reinterpret_cast<uintptr_t>(t.x.const_data_ptr()) % 16 == 0 && stride % 8 == 0;
  const Tensor x = suits ? t.x : gathered(t, device.stream());
  const bool half = t.layout.bits == 4 && dtype_of(t.scales) == dtype_of(t.x);
  const WideChoice c =
      choose_wide(t.layout.bits, half, m, t.layout.n, t.layout.k, cuda::device_facts().sms,
                  t.groups > 1 && t.group_columns == 32, dtype_of(x) == DType::bf16);
  const cuda::PackedLinear p{
      x.const_data_ptr(),
      row_stride(x),
      dtype_of(x),
      m,
      t.layout.n,
      t.layout.k,
      static_cast<const uint32_t*>(t.qweight.const_data_ptr()),
      t.layout.bits,
      t.scales.const_data_ptr(),
      dtype_of(t.scales),
      data(t.zeros),
      t.zeros ? dtype_of(*t.zeros) : DType::other,
      t.group_columns,
      t.groups,
      nullptr,
      t.out.mutable_data_ptr(),
      row_stride(t.out),
      data(t.bias),
      false,
      nullptr,
  };
  check_launch(t.op, cuda::wide_linear(p, {c.tokens, c.blocks, c.groups, c.tile_blocks, c.split},
                                       device.stream()));
}

}  // namespace fastinfer
#endif
