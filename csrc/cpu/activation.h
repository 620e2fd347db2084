// CPU kernels of csrc/ops/activation.cpp. x [rows, 2I] = [gate, up], out [rows, I]; rows: rows.h.
#pragma once

#include "dtype.h"
#include "isa.h"
#include "rows.h"

namespace fastinfer::cpu {

enum class Activation : int { silu, gelu_erf, gelu_tanh };

// Columns of one work item: one token of a wide model still spreads over the threads. A multiple of
// every kLanes, so that an element is computed the same way whatever the split.
constexpr int64_t kActivationTile = 2048;

struct GatedParams {
  RowShape shape;
  Rows x, out;
  DType dtype;
  Activation activation;
  int64_t inner;  // I
};

// int8 codes per row instead of out: quantize_row.h. q is [rows, I] contiguous.
struct GatedQuantParams {
  GatedParams gated;
  int8_t* q;
  float* scale;
  int32_t* zeros;
};

}  // namespace fastinfer::cpu

// Items are tiles: item = row * ceil(I / kActivationTile) + tile.
FI_DECLARE_KERNEL(gated_activation, const GatedParams& p, int64_t begin, int64_t end)
// Items are rows; scratch: I floats of the calling thread.
FI_DECLARE_KERNEL(silu_and_mul_quant, const GatedQuantParams& p, float* scratch, int64_t begin,
                  int64_t end)
