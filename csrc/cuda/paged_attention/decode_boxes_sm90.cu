// Decode attention over 8-bit caches, keys and values copied by TMA: a box is 16 keys of one head
// of a page, 2 KB, where the portable kernel has 32 lanes copy 16 rows of 128 bytes. The arithmetic
// is the same, bit for bit. For plain steps (decode.cuh) over head dimensions of 65 to 128, pages
// of a multiple of 16 keys or dense caches.
#include "../common/tensor_map.h"
#include "decode.cuh"
#include "paged_attention.h"

namespace fastinfer::cuda {
namespace {

template <bool kScalePerToken>
struct BoxParams : PlainParams<1, kScalePerToken> {
  CUtensorMap k_map, v_map;
};

int cache_map(CUtensorMap& map, const DecodeParams& p, const void* cache) {
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  // A dimension of one element is never stepped along; its stride may be anything, also invalid.
  const auto stride = [&](int64_t bytes, int64_t n) { return size(n > 1 ? bytes : 128); };
  const cuuint64_t sizes[4] = {size(p.dim), size(p.page_rows), size(p.heads_kv), size(p.pages)};
  const cuuint64_t strides[3] = {stride(p.k_token, p.page_rows), stride(p.k_head, p.heads_kv),
                                 stride(p.k_page, p.pages)};
  const cuuint32_t box[4] = {128, 16, 1, 1};
  return encode_tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, cache, sizes, strides, box,
                           CU_TENSOR_MAP_SWIZZLE_128B);
}

template <class F, bool kScalePerToken>
int launch_boxes(const DecodeParams& p, int ctas, void* stream) {
  BoxParams<kScalePerToken> boxes;
  static_cast<DecodeParams&>(boxes) = p;
  // Strides that no map can have, of an expanded tensor for one.
  if (cache_map(boxes.k_map, p, p.k) != 0 || cache_map(boxes.v_map, p, p.v) != 0)
    return F::kE4m3 ? launch_decode_e4m3(p, ctas, false, stream)
                    : launch_decode_i8(p, ctas, stream);
  return launch_decode_kernel<F, 128, false, Layout<F, 128, false, 16, true>>(boxes, ctas, stream);
}

}  // namespace

bool boxes_serve(const DecodeParams& p) {
  const bool eight_bit = p.kv_dtype == DType::f8e4m3 || p.kv_dtype == DType::i8;
  return eight_bit && is_plain(p) && p.row_tiles == 1 && p.dim > 64 && p.dim <= 128 &&
         (!p.table || p.page_size % 16 == 0) && !force_portable() &&
         device_facts().compute_capability == 90;
}

int launch_decode_boxes(const DecodeParams& p, int ctas, void* stream) {
  if (p.kv_dtype == DType::f8e4m3)
    return p.scale_per_token_k ? launch_boxes<FormatE4m3, true>(p, ctas, stream)
                               : launch_boxes<FormatE4m3, false>(p, ctas, stream);
  return p.scale_per_token_k ? launch_boxes<FormatI8, true>(p, ctas, stream)
                             : launch_boxes<FormatI8, false>(p, ctas, stream);
}

}  // namespace fastinfer::cuda
