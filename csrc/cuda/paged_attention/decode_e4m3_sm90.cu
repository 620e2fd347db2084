// Decode attention over e4m3 caches, rows fetched by bulk copies.
#include "decode.cuh"

namespace fastinfer::cuda {

int launch_decode_e4m3_sm90(const DecodeParams& p, int slots, void* stream) {
  return launch_decode_dim<FormatE4m3, DecodePath::bulk>(p, slots, stream);
}

}  // namespace fastinfer::cuda
