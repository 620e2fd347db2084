// 8-bit instances of the skinny kernel: bf16 and fp16, groups of a multiple of 64 columns, or of
// any multiple of 8 and zero points.
#include "skinny_launch.cuh"

namespace fastinfer::cuda {

int skinny_linear_int8(const PackedLinear& p, void* stream) { return run_skinny<8>(p, stream); }

int64_t skinny_workspace_int8(const PackedLinear& p) {
  return skinny_generic(p) ? skinny_workspace_of<8, true>(p) : skinny_workspace_of<8, false>(p);
}

}  // namespace fastinfer::cuda
