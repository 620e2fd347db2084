// Rows of tensors with any outer strides. The leading dimensions of the tensors of one call are
// folded together (csrc/ops/rows.h) into at most kRowDims dimensions; row r is then the r-th index
// in row-major order.
#pragma once

#include <cstdint>

namespace fastinfer::cpu {

constexpr int kRowDims = 4;

// The folded leading dimensions, shared by all tensors of a call; ndim >= 1.
struct RowShape {
  int ndim;
  int64_t size[kRowDims];
};

// One tensor: strides in elements, entry d belongs to RowShape::size[d].
struct Rows {
  void* data;
  int64_t stride[kRowDims];
};

namespace {

inline int64_t row_offset(const RowShape& shape, const Rows& t, int64_t r) {
  int64_t offset = 0;
  for (int d = shape.ndim - 1; d > 0; --d) {
    offset += (r % shape.size[d]) * t.stride[d];
    r /= shape.size[d];
  }
  return offset + r * t.stride[0];
}

inline char* row_of(const RowShape& shape, const Rows& t, int64_t r, int64_t element_size) {
  return static_cast<char*>(t.data) + row_offset(shape, t, r) * element_size;
}

}  // namespace
}  // namespace fastinfer::cpu
