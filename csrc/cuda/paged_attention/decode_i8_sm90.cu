// Decode attention over i8 caches, rows fetched by bulk copies.
#include "decode.cuh"

namespace fastinfer::cuda {

int launch_decode_i8_sm90(const DecodeParams& p, int slots, void* stream) {
  return launch_decode_dim<FormatI8, DecodePath::bulk>(p, slots, stream);
}

}  // namespace fastinfer::cuda
