// Decode attention over i8 caches.
#include "decode.cuh"
#include "paged_attention.h"

namespace fastinfer::cuda {

int launch_decode_i8(const DecodeParams& p, int ctas, void* stream) {
  return launch_decode_dim<FormatI8>(p, ctas, stream);
}

}  // namespace fastinfer::cuda
