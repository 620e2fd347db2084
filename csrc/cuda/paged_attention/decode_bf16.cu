// Decode attention over bf16 caches.
#include "decode.cuh"
#include "paged_attention.h"

namespace fastinfer::cuda {

int decode_shared_bytes(bool eight_bit, int dim) {
  if (dim <= 128) return kSmallShared;
  return eight_bit ? Layout<FormatI8, 256>::kTotal : Layout<FormatBf16, 256>::kTotal;
}

int large_shared_bytes() { return Layout<FormatBf16, 128, false, 32, false, 8>::kTotal; }

int launch_decode_bf16(const DecodeParams& p, int ctas, void* stream) {
  return launch_decode_dim<FormatBf16>(p, ctas, stream);
}

}  // namespace fastinfer::cuda
