// Checks of a paged KV cache that several operators share: reshape_and_cache, gather_cache,
// apply_rotary_and_cache.
#pragma once

#include "../cpu/kv_cache.h"
#include "common.h"

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

// CPU tensors: every slot is -1 or inside the cache; with FASTINFER_VALIDATE=1 also that no slot
// comes twice and that static scales are positive.
void check_slots(const char* op, const cpu::CacheWriteParams& p, int64_t tokens, int64_t num_slots);

}  // namespace fastinfer
