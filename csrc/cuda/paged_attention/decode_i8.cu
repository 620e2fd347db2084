// Decode attention over i8 caches, portable (cp.async) path.
#include "decode.cuh"

namespace fastinfer::cuda {

int launch_decode_i8(const DecodeParams& p, int slots, void* stream) {
  return launch_decode_dim<FormatI8, DecodePath::portable>(p, slots, stream);
}

}  // namespace fastinfer::cuda
