// One translation unit per code width and activation type.
#pragma once

#include "wide.h"

namespace fastinfer::cuda::wide {

int wide_int4_bf16(const PackedLinear& p, WideShape shape, void* stream);
int wide_int4_f16(const PackedLinear& p, WideShape shape, void* stream);
int wide_int8_bf16(const PackedLinear& p, WideShape shape, void* stream);
int wide_int8_f16(const PackedLinear& p, WideShape shape, void* stream);

}  // namespace fastinfer::cuda::wide
