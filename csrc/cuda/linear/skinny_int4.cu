// 4-bit instances of the skinny kernel: bf16 and fp16, groups of a multiple of 64 columns, or of
// any multiple of 8 and float zeros. What the direct kernel takes does not come here.
#include "skinny_launch.cuh"

namespace fastinfer::cuda {

int skinny_linear_int4(const PackedLinear& p, void* stream) {
  return direct_fits(p) ? direct_linear(p, stream) : run_skinny<4>(p, stream);
}

int64_t skinny_workspace_int4(const PackedLinear& p) {
  if (direct_fits(p)) return 0;
  return skinny_generic(p) ? skinny_workspace_of<4, true>(p) : skinny_workspace_of<4, false>(p);
}

}  // namespace fastinfer::cuda
