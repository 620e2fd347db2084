// quantize_weight: the rule of csrc/cpu/quantize.cpp, bit for bit (extrema are exact in any order,
// quotients are the IEEE ones):
//
//   symmetric   s = absmax / (2^(b-1) - 1),  z = 2^(b-1)
//   asymmetric  s = (max - min) / (2^b - 1), z = clamp(rne(-min / s)),  min <= 0 <= max
//   q = clamp(rne(w / s) + z), s rounded to its storage dtype first
//
// A group of one row belongs to 1 to 32 neighbouring lanes, a lane for 8 columns and more; the
// second reading finds the group in L1 or L2.
#include "quantize_weight.h"

#include "../common/launch.cuh"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"

namespace fastinfer::cuda {
namespace {

constexpr int kThreads = 256;

struct Launch {
  cpu::QuantizeWeightParams p;
  int64_t slots;  // rows * groups
  int lanes;      // per group, a power of two
};

// s as it is stored; 0 becomes 1.
__device__ __forceinline__ float store_scale(void* to, DType type, int64_t slot, float s,
                                             bool bad) {
  const auto as = [&](auto element) {
    using S = decltype(element);
    S stored = from_float<S>(s);
    if (to_float(stored) == 0.0f) stored = from_float<S>(1.0f);
    if (bad) stored = from_float<S>(__int_as_float(0x7FC00000));
    static_cast<S*>(to)[slot] = stored;
    return to_float(stored);
  };
  if (type == DType::f16) return as(__half{});
  if (type == DType::bf16) return as(__nv_bfloat16{});
  return as(float{});
}

template <class E>
__global__ void __launch_bounds__(kThreads)
    quantize_weight_kernel(const __grid_constant__ Launch a) {
  const cpu::QuantizeWeightParams& p = a.p;
  const int lane = static_cast<int>(threadIdx.x) % a.lanes;
  const int64_t at =
      static_cast<int64_t>(blockIdx.x) * (kThreads / a.lanes) + threadIdx.x / a.lanes;
  const bool active = at < a.slots;
  const int64_t slot = active ? at : 0, row = slot / p.groups, group = slot % p.groups;
  const int64_t begin = group * p.group_size;
  const int64_t left = p.k - begin;
  const int64_t count = !active ? 0 : left < p.group_size ? left : p.group_size;
  grid_wait();
  const E* w = static_cast<const E*>(p.weight) + row * p.weight_stride + begin;
  uint8_t* codes = p.codes + row * p.k + begin;
  float low = 0.0f, high = 0.0f, poison = 0.0f;
  for (int64_t i = lane; i < count; i += a.lanes) {
    const float v = to_float(w[i]);
    low = fminf(low, v);
    high = fmaxf(high, v);
    poison += v - v;
  }
  for (int step = a.lanes / 2; step > 0; step /= 2) {
    low = fminf(low, __shfl_xor_sync(kAllLanes, low, step));
    high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, step));
    poison += __shfl_xor_sync(kAllLanes, poison, step);
  }
  if (!active) return;
  const bool bad = poison != poison;
  const float middle = static_cast<float>(1 << (p.bits - 1)), last = 2.0f * middle - 1.0f;
  float s = p.zeros ? __fsub_rn(__fdiv_rn(high, last), __fdiv_rn(low, last))
                    : __fdiv_rn(fmaxf(high, -low), middle - 1.0f);
  const float largest = p.scale_dtype == DType::f16    ? 65504.0f
                        : p.scale_dtype == DType::bf16 ? 3.38953139e38f
                                                       : 3.40282347e38f;
  s = s > largest ? largest : s;
  // Every lane of the group stores the same bits.
  s = store_scale(p.scales, p.scale_dtype, slot, s, bad);
  float z = middle;
  if (p.zeros) {
    z = s == s ? rintf(__fdiv_rn(-low, s)) : middle;
    z = z > last ? last : z;
    p.zeros[slot] = static_cast<uint8_t>(z);
  }
  const float least = (p.zeros ? 0.0f : 1.0f) - z, most = last - z;
  for (int64_t i = lane; i < count; i += a.lanes) {
    float t = __fdiv_rn(to_float(w[i]), s);
    t = t == t ? t : 0.0f;
    codes[i] = static_cast<uint8_t>(rintf(fminf(fmaxf(t, least), most)) + z);
  }
}

}  // namespace

int quantize_weight(const cpu::QuantizeWeightParams& p, int64_t rows, void* stream) {
  if (rows == 0 || p.k == 0) return cudaSuccess;
  return with_float(p.dtype, [&](auto element) {
    using E = decltype(element);
    const int64_t columns = p.group_size < p.k ? p.group_size : p.k;
    int lanes = 1;
    while (lanes < 32 && lanes * 8 < columns) lanes *= 2;
    const Launch a{p, rows * p.groups, lanes};
    const auto blocks = static_cast<unsigned>(ceil_div(a.slots, kThreads / lanes));
    return launch(quantize_weight_kernel<E>, blocks, kThreads, 0, stream, a);
  });
}

}  // namespace fastinfer::cuda
