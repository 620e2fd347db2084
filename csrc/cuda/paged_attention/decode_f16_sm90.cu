// Decode attention over f16 caches, rows fetched by bulk copies.
#include "decode.cuh"

namespace fastinfer::cuda {

int launch_decode_f16_sm90(const DecodeParams& p, int slots, void* stream) {
  return launch_decode_dim<FormatF16, DecodePath::bulk>(p, slots, stream);
}

}  // namespace fastinfer::cuda
