// What happens before decode attention when k and v come along: new keys (rotated) and values
// written behind the cached ones (quantised for an 8-bit cache), and q copied into a buffer,
// rotated. The copy alone is also made for a q that is not aligned to 4 bytes.
//
//   rotary (Su et al. 2021), c, s = cos, sin[position, i]:  a' = a c - b s,  b' = b c + a s
//   codes and scales: as reshape_and_cache (kv_cache/cache_write.cuh)
//
// One warp per row of D elements: K and V rows (token, head), then rows of q. fp32 in between, one
// rounding to the element type after the rotation.
#include "../common/launch.cuh"
#include "../kv_cache/cache_write.cuh"
#include "paged_attention.h"

namespace fastinfer::cuda {
namespace {

constexpr int kWarps = 4, kMaxDim = 256;

__device__ float table_value(const void* table, DType type, int64_t i) {
  if (type == DType::f32) return static_cast<const float*>(table)[i];
  if (type == DType::f16) return __half2float(static_cast<const __half*>(table)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(table)[i]);
}

template <class T>
__device__ void rotate(const AppendParams& p, int64_t position, float* x, int lane) {
  const int half = p.rotary_dim / 2;
  for (int i = lane; i < half; i += 32) {
    const float c = table_value(p.cos, p.rotary_dtype, position * p.cos_stride + i);
    const float s = table_value(p.sin, p.rotary_dtype, position * p.sin_stride + i);
    const int first = p.interleaved ? 2 * i : i, second = p.interleaved ? 2 * i + 1 : i + half;
    const float a = x[first], b = x[second];
    x[first] = to_float(from_float<T>(a * c - b * s));
    x[second] = to_float(from_float<T>(b * c + a * s));
  }
  __syncwarp();
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps)
    append_kernel(const __grid_constant__ AppendParams p) {
  __shared__ float rows[kWarps][kMaxDim];
  grid_wait();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t cache_rows = static_cast<int64_t>(p.batch) * p.tokens * p.heads_kv;
  const int64_t query_rows = p.q_out ? static_cast<int64_t>(p.batch) * p.q_len * p.heads_q : 0;
  int64_t r = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (r >= 2 * cache_rows + query_rows) return;
  float* x = rows[warp];
  if (r >= 2 * cache_rows) {
    r -= 2 * cache_rows;
    const int head = r % p.heads_q;
    const int64_t token = r / p.heads_q % p.q_len, b = r / p.heads_q / p.q_len;
    const T* from =
        static_cast<const T*>(p.q) + b * p.q_batch + token * p.q_token + head * p.q_head;
    for (int i = lane; i < p.dim; i += 32) x[i] = to_float(from[i]);
    __syncwarp();
    if (p.cos) rotate<T>(p, p.lengths[b * p.lengths_stride] + (p.q_per_token ? token : 0), x, lane);
    T* to = static_cast<T*>(p.q_out) + r * p.dim;
    for (int i = lane; i < p.dim; i += 32) to[i] = from_float<T>(x[i]);
    return;
  }
  const bool value = r >= cache_rows;
  if (value) r -= cache_rows;
  const int head = r % p.heads_kv;
  const int64_t token = r / p.heads_kv % p.tokens, b = r / p.heads_kv / p.tokens;
  const T* from =
      value ? static_cast<const T*>(p.v) + b * p.v_batch + token * p.v_token + head * p.v_head
            : static_cast<const T*>(p.k) + b * p.k_batch + token * p.k_token + head * p.k_head;
  for (int i = lane; i < p.dim; i += 32) x[i] = to_float(from[i]);
  __syncwarp();
  const int64_t position = p.lengths[b * p.lengths_stride] + token;
  if (!value && p.cos) rotate<T>(p, position, x, lane);

  int64_t page = p.cache_rows ? p.cache_rows[b * p.cache_rows_stride] : b, place = position;
  if (p.table) {
    page = p.table[b * p.table_stride + position / p.page_size];
    place = position % p.page_size;
  }
  if (page < 0) return;
  const int64_t at = value ? page * p.vc_page + place * p.vc_token + head * p.vc_head
                           : page * p.kc_page + place * p.kc_token + head * p.kc_head;
  void* cache = value ? p.v_cache : p.k_cache;
  if (p.cache_dtype == p.dtype) {
    T* to = static_cast<T*>(cache) + at;
    for (int i = lane; i < p.dim; i += 32) to[i] = from_float<T>(x[i]);
    return;
  }
  const bool fp8 = p.cache_dtype == DType::f8e4m3;
  float* scale = value ? p.v_scale : p.k_scale;
  scale += value ? head * p.vs_head : head * p.ks_head;
  float unit;
  if (value ? p.v_scale_per_token : p.k_scale_per_token) {
    scale += value ? page * p.vs_page + place * p.vs_token : page * p.ks_page + place * p.ks_token;
    uint32_t top = 0;
    for (int i = lane; i < p.dim; i += 32) top = max(top, __float_as_uint(fabsf(x[i])));
    unit = dynamic_scale(group_max(top, 32), fp8);
    if (lane == 0) *scale = unit;
  } else {
    unit = *scale;
  }
  uint8_t* to = static_cast<uint8_t*>(cache) + at;
  for (int i = lane; i < p.dim; i += 32) to[i] = code_of(x[i], __fdiv_rn(x[i], unit), fp8, p.soft);
}

}  // namespace

int launch_append(const AppendParams& p, void* stream) {
  const int64_t rows = 2 * static_cast<int64_t>(p.batch) * p.tokens * p.heads_kv +
                       (p.q_out ? static_cast<int64_t>(p.batch) * p.q_len * p.heads_q : 0);
  if (rows == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, kWarps))), block(32 * kWarps);
  if (p.dtype == DType::f16) return launch(append_kernel<__half>, grid, block, 0, stream, p);
  return launch(append_kernel<__nv_bfloat16>, grid, block, 0, stream, p);
}

}  // namespace fastinfer::cuda
