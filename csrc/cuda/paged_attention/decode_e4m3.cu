// Decode attention over e4m3 caches.
#include "decode.cuh"
#include "paged_attention.h"

namespace fastinfer::cuda {

int launch_decode_e4m3(const DecodeParams& p, int ctas, bool soft, void* stream) {
  return soft ? launch_decode_dim<FormatE4m3, true>(p, ctas, stream)
              : launch_decode_dim<FormatE4m3, false>(p, ctas, stream);
}

}  // namespace fastinfer::cuda
