// Launcher of w8a8_linear: Y[M,N] = float(sum_k (x - x_zero) w) * x_scale[m] * weight_scale[n]
// + bias[n], x and w int8 with K-contiguous rows, the sum exact in int32 (wrapping like the CPU's),
// the rest fp32 in that order with one rounding to Y. Bits equal the CPU's on every path.
#pragma once

#include "../../cpu/linear.h"
#include "w8a8_choice.h"

namespace fastinfer::cuda {

// weight_sum must be given where x_zeros is (row_sums makes it). Returns a cudaError_t.
int w8a8_linear(const cpu::Int8Params& p, void* stream);

// sums[r] = sum over k of weight[r][k].
int row_sums(const int8_t* weight, int64_t stride, int64_t rows, int64_t k, int32_t* sums,
             void* stream);

// Paths, for w8a8_linear: few tokens; tiles of mma.sync; tiles of wgmma (rows of 16-byte multiples,
// K > 0).
int w8a8_skinny(const cpu::Int8Params& p, void* stream);
int w8a8_tiles(const cpu::Int8Params& p, void* stream);
int w8a8_sm90(const cpu::Int8Params& p, const W8a8Choice& choice, void* stream);

}  // namespace fastinfer::cuda
