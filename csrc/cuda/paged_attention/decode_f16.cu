// Decode attention over f16 caches, portable (cp.async) path.
#include "decode.cuh"

namespace fastinfer::cuda {

int launch_decode_f16(const DecodeParams& p, int slots, void* stream) {
  return launch_decode_dim<FormatF16, DecodePath::portable>(p, slots, stream);
}

}  // namespace fastinfer::cuda
