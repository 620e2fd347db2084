#include "tensor_maps.h"

#include "../common/tensor_map.h"

namespace fastinfer::cuda {
namespace {

cuuint64_t size(int64_t n) { return static_cast<cuuint64_t>(n); }

}  // namespace

int activation_map(CUtensorMap& map, const void* data, DType dtype, int64_t rows, int64_t columns,
                   int64_t row_stride, int64_t box_rows) {
  // A single row is never stepped from; its stride may be anything.
  const cuuint64_t stride = 2 * size(rows > 1 ? row_stride : (columns + 7) / 8 * 8);
  return encode_tensor_map(
      map, dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      data, {size(columns), size(rows), 1, 1}, {stride, stride, stride},
      {64, static_cast<cuuint32_t>(box_rows), 1, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
}

int packed_map(CUtensorMap& map, const void* data, int64_t pieces, int64_t blocks,
               int64_t box_pieces, int64_t box_blocks) {
  constexpr cuuint64_t kPiece = 2048;
  const cuuint64_t row = kPiece * size(pieces);
  return encode_tensor_map(
      map, CU_TENSOR_MAP_DATA_TYPE_INT64, data, {kPiece / 8, size(pieces), size(blocks), 1},
      {kPiece, row, row},
      {kPiece / 8, static_cast<cuuint32_t>(box_pieces), static_cast<cuuint32_t>(box_blocks), 1},
      CU_TENSOR_MAP_SWIZZLE_NONE);
}

int code_map(CUtensorMap& map, const void* data, int64_t rows, int64_t columns, int64_t row_stride,
             int64_t box_rows) {
  const cuuint64_t stride = size(rows > 1 ? row_stride : (columns + 15) / 16 * 16);
  return encode_tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, data,
                           {size(columns), size(rows), 1, 1}, {stride, stride, stride},
                           {128, static_cast<cuuint32_t>(box_rows), 1, 1},
                           CU_TENSOR_MAP_SWIZZLE_128B);
}

}  // namespace fastinfer::cuda
