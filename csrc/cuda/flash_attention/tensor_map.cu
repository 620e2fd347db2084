#include "tensor_map.h"

#include "../common/tensor_map.h"

namespace fastinfer::cuda::flash {
int tensor_map(CUtensorMap& map, const void* data, DType dtype, int64_t head_dim, int64_t rows,
               int64_t heads, int64_t batch, int64_t row_stride, int64_t head_stride,
               int64_t batch_stride, int64_t box_rows) {
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  // A dimension of one element is never stepped along; its stride may be anything, also invalid.
  const auto bytes = [&](int64_t stride, int64_t n) {
    return static_cast<cuuint64_t>(2 * (n > 1 ? stride : (head_dim + 7) / 8 * 8));
  };
  const cuuint64_t sizes[4] = {size(head_dim), size(rows), size(heads), size(batch)};
  const cuuint64_t strides[3] = {bytes(row_stride, rows), bytes(head_stride, heads),
                                 bytes(batch_stride, batch)};
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(box_rows), 1, 1};
  return encode_tensor_map(
      map, dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      data, sizes, strides, box, CU_TENSOR_MAP_SWIZZLE_128B);
}

}  // namespace fastinfer::cuda::flash
