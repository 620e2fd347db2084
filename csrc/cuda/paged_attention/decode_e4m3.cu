// Decode attention over e4m3 caches, portable (cp.async) path.
#include "decode.cuh"

namespace fastinfer::cuda {

int launch_decode_e4m3(const DecodeParams& p, int slots, bool soft, void* stream) {
  return soft ? launch_decode_dim<FormatE4m3, DecodePath::soft>(p, slots, stream)
              : launch_decode_dim<FormatE4m3, DecodePath::portable>(p, slots, stream);
}

}  // namespace fastinfer::cuda
