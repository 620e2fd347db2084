// Decode attention over bf16 caches.
#include "decode.cuh"
#include "paged_attention.h"

namespace fastinfer::cuda {

int launch_decode_bf16(const DecodeParams& p, int ctas, void* stream) {
  return launch_decode_dim<FormatBf16>(p, ctas, stream);
}

}  // namespace fastinfer::cuda
