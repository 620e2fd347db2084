// The last step of a row: divided by its sum, with the sink as one more term of that, scaled,
// rounded.
#pragma once

#include "attend.cuh"

namespace fastinfer::cuda {

// Four columns of packed row r of (sequence b, key head head_kv), relative to the maximum `top`.
template <class P>
__device__ __forceinline__ void emit_row(const P& p, int b, int head_kv, int r, int column,
                                         float4 o, float top, float sum) {
  const int token = p.q_len == 1 ? 0 : r / p.group;
  const int head = head_kv * p.group + r - token * p.group;
  float weight = 1.0f;
  if (p.v_scale && !p.scale_per_token_v) weight = __ldg(p.v_scale + head_kv * p.vs_head);
  if (p.sinks && sum != 0.0f) {
    const int64_t at = head * p.sinks_stride;
    float sink = p.sinks_dtype == DType::f32 ? static_cast<const float*>(p.sinks)[at]
                 : p.sinks_dtype == DType::f16
                     ? __half2float(static_cast<const __half*>(p.sinks)[at])
                     : __bfloat162float(static_cast<const __nv_bfloat16*>(p.sinks)[at]);
    sink *= kLog2e;
    const float higher = fmaxf(sink, top), shrink = exp2f(top - higher);
    sum = sum * shrink + exp2f(sink - higher);
    weight *= shrink;
    top = higher;
  }
  const float inverse = sum == 0.0f ? 0.0f : weight / sum;
  const float x[4] = {o.x * inverse, o.y * inverse, o.z * inverse, o.w * inverse};
  const int64_t at = b * p.out_batch + token * p.out_token + head * p.out_head + column;
  uint16_t* out = static_cast<uint16_t*>(p.out) + at;
  uint2 packed;
  if (p.q_dtype == DType::bf16)
    packed = make_uint2(pack_half2<true>(x[0], x[1]), pack_half2<true>(x[2], x[3]));
  else
    packed = make_uint2(pack_half2<false>(x[0], x[1]), pack_half2<false>(x[2], x[3]));
  if (p.out_packs) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(out), "r"(packed.x), "r"(packed.y)
                 : "memory");
  } else {
    out[0] = static_cast<uint16_t>(packed.x);
    out[1] = static_cast<uint16_t>(packed.x >> 16);
    out[2] = static_cast<uint16_t>(packed.y);
    out[3] = static_cast<uint16_t>(packed.y >> 16);
  }
  if (p.lse && column == 0)
    p.lse[b * p.lse_batch + token * p.lse_token + head * p.lse_head] =
        sum == 0.0f ? kMinusInf : top * kLn2 + logf(sum);
}

}  // namespace fastinfer::cuda
