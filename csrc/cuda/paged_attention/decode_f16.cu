// Decode attention over f16 caches.
#include "decode.cuh"
#include "paged_attention.h"

namespace fastinfer::cuda {

int launch_decode_f16(const DecodeParams& p, int ctas, void* stream) {
  return launch_decode_dim<FormatF16>(p, ctas, stream);
}

}  // namespace fastinfer::cuda
