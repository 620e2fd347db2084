// out = act(gate) * up, fp32 arithmetic, one rounding. x [rows, 2I] = [gate, up], out [rows, I],
// any row strides (cpu/rows.h).
//
// Elementwise: a block is a tile of packs of 16 bytes, threadIdx.x across a row and threadIdx.y
// over rows, blockIdx.x over rows and blockIdx.y along them. Every thread has two packs of gate and
// two of up under way. How wide a tile is depends on the amount of work, which no element notices.
#include "activation.h"

#include "../common/row_group.cuh"
#include "gate.cuh"

namespace fastinfer::cuda {
namespace {

constexpr int kThreads = 256;

struct GatedLaunch {
  cpu::GatedParams p;
  int64_t rows;
  bool packs;
};

template <cpu::Activation kKind, class E>
__device__ __forceinline__ uint4 gated_pack(const uint4& gate, const uint4& up) {
  float g[Pack<E>::kSize], u[Pack<E>::kSize];
  unpack<E>(g, gate);
  unpack<E>(u, up);
#pragma unroll
  for (int j = 0; j < Pack<E>::kSize; ++j) g[j] = activate<kKind, E>(g[j]) * u[j];
  return pack_of<E>(g);
}

template <class E>
__global__ void __launch_bounds__(kThreads, 8) gated_kernel(const __grid_constant__ GatedLaunch a) {
  const cpu::GatedParams& p = a.p;
  const int64_t r = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int inner = static_cast<int>(p.inner);
  const int i = (blockIdx.y * blockDim.x + threadIdx.x) * Pack<E>::kSize;
  grid_launch_dependents();
  grid_wait();
  if (r >= a.rows || i >= inner) return;
  const E* x = static_cast<const E*>(p.x.data) + row_offset_of(p.shape, p.x, r);
  const uint4 gate = load_pack(x, i, inner, a.packs);
  const uint4 up = load_pack(x + inner, i, inner, a.packs);
  uint4 y;
  if (p.activation == cpu::Activation::silu) {
    y = gated_pack<cpu::Activation::silu, E>(gate, up);
  } else if (p.activation == cpu::Activation::gelu_erf) {
    y = gated_pack<cpu::Activation::gelu_erf, E>(gate, up);
  } else {
    y = gated_pack<cpu::Activation::gelu_tanh, E>(gate, up);
  }
  E* out = static_cast<E*>(p.out.data) + row_offset_of(p.shape, p.out, r);
  store_pack(out, i, inner, a.packs, y);
}

}  // namespace

int gated_activation(const cpu::GatedParams& p, int64_t rows, void* stream) {
  return with_float(p.dtype, [&](auto element) {
    using E = decltype(element);
    const int64_t packs = ceil_div(p.inner, Pack<E>::kSize);
    GatedLaunch a{p, rows, false};
    a.packs = row_packs(p.shape, p.x, p.inner, sizeof(E)) &&
              row_packs(p.shape, p.out, p.inner, sizeof(E));
    const TileLayout tile = tile_layout(rows, packs, kThreads, device_facts().sms);
    const dim3 grid(static_cast<unsigned>(ceil_div(rows, tile.rows)),
                    static_cast<unsigned>(ceil_div(packs, tile.width)));
    return launch(gated_kernel<E>, grid, dim3(tile.width, tile.rows), 0, stream, a);
  });
}

}  // namespace fastinfer::cuda
