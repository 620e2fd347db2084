// reshape_and_cache and gather_cache: the paged KV cache (Kwon et al. 2023), checks, then tokens in
// parallel.
//
//   caches [num_blocks, P, Hkv, D], any outer strides; float, or fp8 e4m3 / int8 with fp32 scales
//   (scalar, [Hkv] or [num_blocks, P, Hkv]); tokens [T, Hkv, D], any outer strides
//   slot = block * P + position, -1 = skip
//
// On the CPU every index is checked before anything is written. Block moves: kv_cache_blocks.cpp.
#include "kv_cache.h"

#include <algorithm>
#include <cmath>

#include "same_call.h"

#ifdef FASTINFER_WITH_CUDA
#include "../cuda/kv_cache/kv_cache.h"
#include "cuda_shim.h"
#endif

namespace fastinfer {
namespace {

using cpu::CacheGatherParams;
using cpu::CacheSide;
using cpu::CacheWriteParams;
using cpu::ScaleView;

CacheSide side(const Tensor& tokens, const Tensor& cache, const ScaleView& scale) {
  return {const_cast<void*>(tokens.const_data_ptr()),
          tokens.stride(0),
          tokens.stride(1),
          const_cast<void*>(cache.const_data_ptr()),
          cache.stride(0),
          cache.stride(1),
          cache.stride(2),
          scale};
}

// Tokens [T, Hkv, D] that fit the cache.
void check_tokens(const char* op, const char* arg, const Tensor& t, int64_t tokens,
                  const Tensor& cache) {
  check_dtype(op, arg, t, {DType::f32, DType::f16, DType::bf16});
  check_shape(op, arg, t, {tokens, cache.size(2), cache.size(3)});
  check_last_dim(op, arg, t);
}

void reshape_and_cache(const Tensor& key, const Tensor& value, const Tensor& key_cache,
                       const Tensor& value_cache, const Tensor& slot_mapping,
                       const OptTensor& k_scale, const OptTensor& v_scale) {
  const char* op = "reshape_and_cache";
  struct Checked {
    CallShape<7> call;
    CacheWriteParams params;
  };
  static thread_local Checked last;  // zeros at first
  CallShape<7> call;
  const bool known = call.read(0, {&key, &value, &key_cache, &value_cache, &slot_mapping,
                                   ptr(k_scale), ptr(v_scale)}) &&
                     call == last.call;
  if (!known) {
    last.call.count = 0;
    last.params = cache_write_params(op, "key", "value", key, value, key_cache, value_cache,
                                     slot_mapping, k_scale, v_scale);
    last.call = call;
  }
  CacheWriteParams p = last.params;
  if (known)
    set_addresses(p, key.const_data_ptr(), value, key_cache, value_cache, slot_mapping, k_scale,
                  v_scale);
  if (key.numel() == 0) return;
  const int64_t tokens = key.size(0), num_slots = key_cache.size(0) * key_cache.size(1);
  if (!key.is_cpu()) {
    if (validate_data())
      check_slots_on_device(op, p, tokens, num_slots, slot_mapping, k_scale, v_scale);
    FI_CUDA(op, key, cuda::launch_write_cache(p, tokens, stream));
    return;
  }
  check_slots(op, p, tokens, num_slots);
  torch::stable::parallel_for(
      0, tokens, grain(p.heads * p.dim * 4),
      [&](int64_t begin, int64_t end) { FI_PICK(write_cache)(p, begin, end); });
}

// Sequence lengths, start positions and the block ids that will be read.
void check_gather_indices(const char* op, const CacheGatherParams& p, int64_t num_tokens,
                          int64_t max_blocks, int64_t num_blocks) {
  int64_t begin = index_at(p.cu_seqlens, p.cu_dtype, 0);
  FI_CHECK(begin == 0, op, ": cu_seqlens must start with 0, got ", begin);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t end = index_at(p.cu_seqlens, p.cu_dtype, (b + 1) * p.cu_stride);
    FI_CHECK(end >= begin && end <= num_tokens, op,
             ": cu_seqlens must not decrease and must end at or below num_tokens (", num_tokens,
             "), got ", end, " after ", begin, " at index ", b + 1);
    const int64_t first =
        p.seq_starts ? index_at(p.seq_starts, p.starts_dtype, b * p.starts_stride) : 0;
    const int64_t room = max_blocks * p.block_size;
    // first may be anything: near 2^63 the sum would wrap around and pass for a small position
    const int64_t last = first < room ? first + (end - begin) - 1 : first;
    if (end > begin) {
      FI_CHECK(first >= 0 && last < room, op, ": sequence ", b, " reads cached positions ", first,
               " to ", last, ", but its block_table row holds ", room,
               "; pass a wider block_table or correct seq_starts and cu_seqlens");
      for (int64_t i = first / p.block_size; i <= last / p.block_size; ++i) {
        const int64_t id =
            index_at(p.block_table, p.table_dtype, b * p.table_row_stride + i * p.table_col_stride);
        FI_CHECK(id >= 0 && id < num_blocks, op, ": block_table must hold block ids below ",
                 num_blocks, " where they are read, got ", id, " at [", b, ", ", i, "]");
      }
    }
    begin = end;
  }
}

void gather_cache(const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_table,
                  const Tensor& cu_seqlens, const OptTensor& seq_starts, const OptTensor& k_scale,
                  const OptTensor& v_scale, const Tensor& key_out, const Tensor& value_out) {
  const char* op = "gather_cache";
  check_caches(op, key_cache, value_cache);
  check_device(op, key_cache,
               {{"value_cache", &value_cache},
                {"block_table", &block_table},
                {"cu_seqlens", &cu_seqlens},
                {"seq_starts", ptr(seq_starts)},
                {"k_scale", ptr(k_scale)},
                {"v_scale", ptr(v_scale)},
                {"key_out", &key_out},
                {"value_out", &value_out}});
  check_dim(op, "block_table", block_table, 2);
  const int64_t batch = block_table.size(0);
  check_index(op, "block_table", block_table, {batch, -1});
  check_index(op, "cu_seqlens", cu_seqlens, {batch + 1});
  if (seq_starts) check_index(op, "seq_starts", *seq_starts, {batch});
  check_dim(op, "key_out", key_out, 3);
  check_tokens(op, "key_out", key_out, -1, key_cache);
  check_tokens(op, "value_out", value_out, key_out.size(0), key_cache);
  check_same_dtype(op, "value_out", value_out, "key_out", key_out);
  check_written(op, "key_out", key_out);
  check_written(op, "value_out", value_out);
  check_apart(op, "key_out", key_out, {{"key_cache", &key_cache}, {"value_cache", &value_cache}});
  check_apart(op, "value_out", value_out,
              {{"key_cache", &key_cache}, {"value_cache", &value_cache}});
  CacheGatherParams p{};
  p.key = side(key_out, key_cache, check_scale(op, "k_scale", k_scale, key_cache));
  p.value = side(value_out, value_cache, check_scale(op, "v_scale", v_scale, value_cache));
  if (key_out.numel() == 0) return;
  p.block_table = block_table.const_data_ptr(), p.table_dtype = dtype_of(block_table);
  p.table_row_stride = block_table.stride(0), p.table_col_stride = block_table.stride(1);
  p.cu_seqlens = cu_seqlens.const_data_ptr(), p.cu_dtype = dtype_of(cu_seqlens);
  p.cu_stride = cu_seqlens.stride(0);
  p.seq_starts = data(seq_starts);
  if (seq_starts) p.starts_dtype = dtype_of(*seq_starts), p.starts_stride = seq_starts->stride(0);
  p.token_dtype = dtype_of(key_out), p.cache_dtype = dtype_of(key_cache);
  p.batch = batch, p.block_size = key_cache.size(1);
  p.heads = key_cache.size(2), p.dim = key_cache.size(3);
  const int64_t tokens = key_out.size(0), blocks = key_cache.size(0);
  if (!key_cache.is_cpu()) {
#ifdef FASTINFER_WITH_CUDA
    if (validate_data()) {
      const CudaLaunch device(key_cache);
      const HostCopy table(op, "block_table", block_table, device.stream());
      const HostCopy lengths(op, "cu_seqlens", cu_seqlens, device.stream());
      std::optional<HostCopy> starts;
      if (seq_starts) starts.emplace(op, "seq_starts", *seq_starts, device.stream());
      CacheGatherParams host = p;
      host.block_table = table.data(), host.cu_seqlens = lengths.data();
      host.seq_starts = starts ? starts->data() : nullptr;
      check_gather_indices(op, host, tokens, block_table.size(1), blocks);
    }
#endif
    FI_CUDA(op, key_cache, cuda::launch_gather_cache(p, tokens, stream));
    return;
  }
  check_gather_indices(op, p, tokens, block_table.size(1), blocks);
  torch::stable::parallel_for(
      0, tokens, grain(p.heads * p.dim * 4),
      [&](int64_t begin, int64_t end) { FI_PICK(gather_cache)(p, begin, end); });
}

}  // namespace

void check_caches(const char* op, const Tensor& key_cache, const Tensor& value_cache) {
  check_dim(op, "key_cache", key_cache, 4);
  check_dtype(op, "key_cache", key_cache,
              {DType::f32, DType::f16, DType::bf16, DType::f8e4m3, DType::i8});
  check_written(op, "key_cache", key_cache);
  check_same_dtype(op, "value_cache", value_cache, "key_cache", key_cache);
  check_shape(op, "value_cache", value_cache,
              {key_cache.size(0), key_cache.size(1), key_cache.size(2), key_cache.size(3)});
  check_written(op, "value_cache", value_cache);
}

ScaleView check_scale(const char* op, const char* arg, const OptTensor& scale,
                      const Tensor& cache) {
  if (!is_8bit(dtype_of(cache))) {
    FI_CHECK(!scale, op, ": ", arg, " must be None for a cache of ",
             dtype_name(cache.scalar_type()), ", got ", scale ? describe(*scale) : std::string(),
             "; only 8-bit caches have scales");
    return {};
  }
  const int64_t blocks = cache.size(0), positions = cache.size(1), heads = cache.size(2);
  FI_CHECK(scale, op, ": ", arg, " must be given for a cache of ", dtype_name(cache.scalar_type()),
           ", got None; pass an fp32 scalar, [", heads, "] or [", blocks, ", ", positions, ", ",
           heads, "]");
  check_dtype(op, arg, *scale, {DType::f32});
  float* p = static_cast<float*>(const_cast<void*>(scale->const_data_ptr()));
  if (scale->dim() <= 1 && scale->numel() == 1) return {p, 0, 0, 0, false};
  if (scale->dim() == 1 && scale->size(0) == heads) return {p, 0, 0, scale->stride(0), false};
  FI_CHECK(scale->dim() == 3 && scale->size(0) == blocks && scale->size(1) == positions &&
               scale->size(2) == heads,
           op, ": ", arg, " must be a scalar or have shape [", heads, "] or [", blocks, ", ",
           positions, ", ", heads, "], got ", describe(*scale));
  return {p, scale->stride(0), scale->stride(1), scale->stride(2), true};
}

void check_index(const char* op, const char* arg, const Tensor& t,
                 std::initializer_list<int64_t> shape) {
  check_dtype(op, arg, t, {DType::i32, DType::i64});
  check_shape(op, arg, t, shape);
}

CacheWriteParams cache_write_params(const char* op, const char* key_name, const char* value_name,
                                    const Tensor& key, const Tensor& value, const Tensor& key_cache,
                                    const Tensor& value_cache, const Tensor& slot_mapping,
                                    const OptTensor& k_scale, const OptTensor& v_scale) {
  check_device(op, key,
               {{value_name, &value},
                {"key_cache", &key_cache},
                {"value_cache", &value_cache},
                {"slot_mapping", &slot_mapping},
                {"k_scale", ptr(k_scale)},
                {"v_scale", ptr(v_scale)}});
  check_caches(op, key_cache, value_cache);
  check_dim(op, key_name, key, 3);
  check_tokens(op, key_name, key, -1, key_cache);
  check_tokens(op, value_name, value, key.size(0), key_cache);
  check_same_dtype(op, value_name, value, key_name, key);
  if (!is_8bit(dtype_of(key_cache))) check_same_dtype(op, key_name, key, "key_cache", key_cache);
  check_index(op, "slot_mapping", slot_mapping, {key.size(0)});
  CacheWriteParams p{};
  p.key = side(key, key_cache, check_scale(op, "k_scale", k_scale, key_cache));
  p.value = side(value, value_cache, check_scale(op, "v_scale", v_scale, value_cache));
  p.slots = slot_mapping.const_data_ptr();
  p.slot_stride = slot_mapping.stride(0);
  p.slot_dtype = dtype_of(slot_mapping);
  p.token_dtype = dtype_of(key), p.cache_dtype = dtype_of(key_cache);
  p.block_size = key_cache.size(1), p.heads = key_cache.size(2), p.dim = key_cache.size(3);
  return p;
}

void set_addresses(CacheWriteParams& p, const void* key, const Tensor& value,
                   const Tensor& key_cache, const Tensor& value_cache, const Tensor& slot_mapping,
                   const OptTensor& k_scale, const OptTensor& v_scale) {
  p.key.tokens = const_cast<void*>(key);
  p.value.tokens = const_cast<void*>(value.const_data_ptr());
  p.key.cache = const_cast<void*>(key_cache.const_data_ptr());
  p.value.cache = const_cast<void*>(value_cache.const_data_ptr());
  p.slots = slot_mapping.const_data_ptr();
  p.key.scale.data = static_cast<float*>(const_cast<void*>(data(k_scale)));
  p.value.scale.data = static_cast<float*>(const_cast<void*>(data(v_scale)));
}

void check_slots(const char* op, const CacheWriteParams& p, int64_t tokens, int64_t num_slots) {
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t slot = index_at(p.slots, p.slot_dtype, t * p.slot_stride);
    FI_CHECK(slot >= -1 && slot < num_slots, op,
             ": slot_mapping must hold -1 (skip) or block * block_size + position below ",
             num_slots, ", got ", slot, " at index ", t);
  }
  if (!validate_data()) return;
  std::vector<int64_t> used;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t slot = index_at(p.slots, p.slot_dtype, t * p.slot_stride);
    if (slot >= 0) used.push_back(slot);
  }
  std::sort(used.begin(), used.end());
  const auto twice = std::adjacent_find(used.begin(), used.end());
  FI_CHECK(twice == used.end(), op, ": slot_mapping must not name a slot twice, got ",
           twice == used.end() ? 0 : *twice, " more than once; the result would depend on threads");
  for (const ScaleView* s : {&p.key.scale, &p.value.scale}) {
    if (!s->data || s->dynamic) continue;
    for (int64_t h = 0; h < (s->head ? p.heads : 1); ++h) {
      const float value = s->data[h * s->head];
      FI_CHECK(value > 0.0f && std::isfinite(value), op, ": ",
               s == &p.key.scale ? "k_scale" : "v_scale", " must be positive and finite, got ",
               value, " for head ", h);
    }
  }
}

void check_slots_on_device([[maybe_unused]] const char* op,
                           [[maybe_unused]] const CacheWriteParams& p,
                           [[maybe_unused]] int64_t tokens, [[maybe_unused]] int64_t num_slots,
                           [[maybe_unused]] const Tensor& slot_mapping,
                           [[maybe_unused]] const OptTensor& k_scale,
                           [[maybe_unused]] const OptTensor& v_scale) {
#ifdef FASTINFER_WITH_CUDA
  const CudaLaunch device(slot_mapping);
  const HostCopy slots(op, "slot_mapping", slot_mapping, device.stream());
  CacheWriteParams host = p;
  host.slots = slots.data();
  std::vector<HostCopy> scales;
  scales.reserve(2);
  auto copy = [&](const char* arg, const OptTensor& scale, ScaleView& view) {
    if (!scale || view.dynamic) return;  // dynamic scales are written, not read
    scales.emplace_back(op, arg, *scale, device.stream());
    view.data = static_cast<float*>(const_cast<void*>(scales.back().data()));
  };
  copy("k_scale", k_scale, host.key.scale);
  copy("v_scale", v_scale, host.value.scale);
  check_slots(op, host, tokens, num_slots);
#endif
}

FI_REGISTER_BOTH({
  m.impl("reshape_and_cache", TORCH_BOX(&reshape_and_cache));
  m.impl("gather_cache", TORCH_BOX(&gather_cache));
})

}  // namespace fastinfer
