#include "tensor_maps.h"

#include <cuda_runtime.h>

namespace fastinfer::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault,
                                       &found) != cudaSuccess ||
      found != cudaDriverEntryPointSuccess)
    return nullptr;
  return reinterpret_cast<Encode>(entry);
}

// Four dimensions, the last ones of size 1: sizes and boxes in elements, strides in bytes.
int encode(CUtensorMap& map, CUtensorMapDataType type, const void* data,
           const cuuint64_t (&sizes)[4], const cuuint64_t (&strides)[3], const cuuint32_t (&box)[4],
           CUtensorMapSwizzle swizzle) {
  static const Encode entry = find_encode();
  if (!entry) return cudaErrorNotSupported;
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult result =
      entry(&map, type, 4, const_cast<void*>(data), sizes, strides, box, steps,
            CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

cuuint64_t size(int64_t n) { return static_cast<cuuint64_t>(n); }

}  // namespace

int activation_map(CUtensorMap& map, const void* data, DType dtype, int64_t rows, int64_t columns,
                   int64_t row_stride, int64_t box_rows) {
  // A single row is never stepped from; its stride may be anything.
  const cuuint64_t stride = 2 * size(rows > 1 ? row_stride : (columns + 7) / 8 * 8);
  return encode(
      map, dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      data, {size(columns), size(rows), 1, 1}, {stride, stride, stride},
      {64, static_cast<cuuint32_t>(box_rows), 1, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
}

int packed_map(CUtensorMap& map, const void* data, int64_t pieces, int64_t blocks,
               int64_t box_pieces, int64_t box_blocks) {
  constexpr cuuint64_t kPiece = 2048;
  const cuuint64_t row = kPiece * size(pieces);
  return encode(
      map, CU_TENSOR_MAP_DATA_TYPE_INT64, data, {kPiece / 8, size(pieces), size(blocks), 1},
      {kPiece, row, row},
      {kPiece / 8, static_cast<cuuint32_t>(box_pieces), static_cast<cuuint32_t>(box_blocks), 1},
      CU_TENSOR_MAP_SWIZZLE_NONE);
}

int code_map(CUtensorMap& map, const void* data, int64_t rows, int64_t columns, int64_t row_stride,
             int64_t box_rows) {
  const cuuint64_t stride = size(rows > 1 ? row_stride : (columns + 15) / 16 * 16);
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, data, {size(columns), size(rows), 1, 1},
                {stride, stride, stride}, {128, static_cast<cuuint32_t>(box_rows), 1, 1},
                CU_TENSOR_MAP_SWIZZLE_128B);
}

}  // namespace fastinfer::cuda
