// Decode attention over bf16 caches, rows fetched by bulk copies.
#include "decode.cuh"

namespace fastinfer::cuda {

int launch_decode_bf16_sm90(const DecodeParams& p, int slots, void* stream) {
  return launch_decode_dim<FormatBf16, DecodePath::bulk>(p, slots, stream);
}

}  // namespace fastinfer::cuda
