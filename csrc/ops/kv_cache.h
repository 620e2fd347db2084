// Checks of a paged KV cache that several operators share: reshape_and_cache, gather_cache,
// apply_rotary_and_cache; and the CUDA side of the operators that move blocks.
#pragma once

#include "../cpu/kv_cache.h"
#include "common.h"
#include "strided_copy.h"

namespace fastinfer {

// key_cache and value_cache [num_blocks, P, Hkv, D] of one dtype and shape, any outer strides.
void check_caches(const char* op, const Tensor& key_cache, const Tensor& value_cache);

// fp32 scalar, [Hkv] or [num_blocks, P, Hkv] for an 8-bit cache, absent for a float cache.
cpu::ScaleView check_scale(const char* op, const char* arg, const OptTensor& scale,
                           const Tensor& cache);

// int32 or int64 of the given shape, any strides.
void check_index(const char* op, const char* arg, const Tensor& t,
                 std::initializer_list<int64_t> shape);

// Everything about writing key, value [T, Hkv, D] at slot_mapping [T], on metadata alone. The names
// are those of the arguments in messages.
cpu::CacheWriteParams cache_write_params(const char* op, const char* key_name,
                                         const char* value_name, const Tensor& key,
                                         const Tensor& value, const Tensor& key_cache,
                                         const Tensor& value_cache, const Tensor& slot_mapping,
                                         const OptTensor& k_scale, const OptTensor& v_scale);

// The addresses in the parameters of a call that differs from this one in nothing else.
void set_addresses(cpu::CacheWriteParams& p, const void* key, const Tensor& value,
                   const Tensor& key_cache, const Tensor& value_cache, const Tensor& slot_mapping,
                   const OptTensor& k_scale, const OptTensor& v_scale);

// CPU tensors: every slot is -1 or inside the cache; with FASTINFER_VALIDATE=1 also that no slot
// comes twice and that static scales are positive.
void check_slots(const char* op, const cpu::CacheWriteParams& p, int64_t tokens, int64_t num_slots);

// The same for CUDA tensors, for FASTINFER_VALIDATE=1 only: the values are copied to the host.
void check_slots_on_device(const char* op, const cpu::CacheWriteParams& p, int64_t tokens,
                           int64_t num_slots, const Tensor& slot_mapping, const OptTensor& k_scale,
                           const OptTensor& v_scale);

// ---- moving blocks
// (source, destination) ids of block_mapping, checked.
struct BlockMapping {
  std::vector<int64_t> src, dst;
};

// CUDA side of kv_cache_blocks.cpp. `caches` on one device, which holds `mapping` too.
void copy_blocks_on_device(const std::vector<Tensor>& caches, const Tensor& mapping,
                           int64_t num_blocks);
// Every pair of tensors with a CUDA side.
void swap_blocks_with_device(const std::vector<Tensor>& src, const std::vector<Tensor>& dst,
                             const BlockMapping& mapping);
void repeat_on_device(const StridedCopy& copy, const Tensor& x, const Tensor& out, int64_t n_rep,
                      int64_t rep_stride);

}  // namespace fastinfer
