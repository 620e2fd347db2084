// Launchers of the KV cache operators. Strides of the parameter structs of csrc/cpu are in
// elements, those of CopyShape in bytes. Every launcher returns a cudaError_t.
#pragma once

#include <cstdint>

#include "../../cpu/kv_cache.h"

namespace fastinfer::cuda {

// slots and tokens on the device; slots below 0 are skipped, others must be inside the cache.
int launch_write_cache(const cpu::CacheWriteParams& p, int64_t tokens, void* stream);

// Fills all `tokens` rows of the output.
int launch_gather_cache(const cpu::CacheGatherParams& p, int64_t tokens, void* stream);

// A region of runs of contiguous bytes: sizes and strides of its outer dimensions, innermost first.
struct CopyShape {
  static constexpr int kMaxDims = 4;
  int dims;
  int64_t size[kMaxDims], src_stride[kMaxDims], dst_stride[kMaxDims];
  int64_t run_bytes;
};

// dst region = src region, n_rep times, rep_stride bytes apart.
int launch_repeat(const CopyShape& shape, const void* src, void* dst, int64_t n_rep,
                  int64_t rep_stride, void* stream);

// Block pairs on the device: mapping [pairs, 2] with strides in elements.
struct DeviceMapping {
  const void* data;
  DType dtype;
  int64_t pair_stride, side_stride, pairs;
};

// caches[i]: block b at caches[i] + b * block_stride. Pairs with an id outside [0, num_blocks) are
// skipped. One launch per kMaxCaches caches.
constexpr int kMaxCaches = 448;
int launch_copy_blocks(const CopyShape& shape, int64_t block_stride, int64_t num_blocks,
                       char* const* caches, int64_t count, const DeviceMapping& mapping,
                       void* stream);

// dst[i] + d * dst_block = src[i] + s * src_block for pairs (s, d) on the host. Both sides must be
// memory that a kernel can reach: of this device, of a peer, or pinned on the host (`over_pcie`:
// few CTAs, which is what the link can use).
int launch_swap_blocks(const CopyShape& shape, int64_t src_block, int64_t dst_block,
                       const char* const* src, char* const* dst, int64_t count,
                       const int64_t* src_ids, const int64_t* dst_ids, int64_t pairs,
                       bool over_pcie, void* stream);

// The same through a dense buffer on the device, of pairs * host_block bytes: for one pair of
// tensors whose host side is dense. host_ids ascend; stretches of consecutive ones are copied at
// once. `reachable`: a kernel can read and write the host side. A block has fewer than 2^30 bytes.
int launch_staged_swap(const CopyShape& shape, int64_t device_block, int64_t host_block,
                       char* device, char* host, bool into_host, bool reachable,
                       const int64_t* device_ids, const int64_t* host_ids, int64_t pairs,
                       char* staging, void* stream);

// ---- host memory and other devices
// May a kernel read and write these bytes of the host? (Pinned or registered memory.)
bool is_pinned(const void* p, int64_t bytes);
int copy_async(void* dst, const void* src, int64_t bytes, void* stream);
// Work that `later` gets from now on starts after what `earlier` holds now. `device`: of `earlier`.
int order_streams(void* earlier, int device, void* later);

}  // namespace fastinfer::cuda
