// Element types known to the kernels, CPU and CUDA. Plain enum, no torch header.
#pragma once

#include <cstdint>

namespace fastinfer {

enum class DType : int32_t { f32, f16, bf16, f8e4m3, i8, u8, i32, i64, f64, boolean, other };

constexpr int64_t dtype_size(DType t) {
  switch (t) {
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::f16:
    case DType::bf16:
      return 2;
    case DType::i64:
    case DType::f64:
      return 8;
    default:
      return 1;
  }
}

}  // namespace fastinfer
