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

constexpr int kThreads = 256, kTilePacks = 2;

struct GatedLaunch {
  cpu::GatedParams p;
  int64_t rows;
  bool packs;
};

template <cpu::Activation kKind, class E>
__device__ __forceinline__ Pack<E> gated_pack(const Pack<E>& gate, const Pack<E>& up) {
  float g[Pack<E>::kSize], u[Pack<E>::kSize];
  unpack(g, gate);
  unpack(u, up);
#pragma unroll
  for (int j = 0; j < Pack<E>::kSize; ++j) g[j] = activate<kKind>(g[j]) * u[j];
  return pack_of<E>(g);
}

template <class E>
__global__ void __launch_bounds__(kThreads) gated_kernel(const __grid_constant__ GatedLaunch a) {
  constexpr int kSize = Pack<E>::kSize;
  const cpu::GatedParams& p = a.p;
  const int64_t r = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int inner = static_cast<int>(p.inner), step = blockDim.x * kSize;
  const int first = blockIdx.y * step * kTilePacks + threadIdx.x * kSize;
  grid_wait();
  if (r >= a.rows || first >= inner) return;
  const E* gate = static_cast<const E*>(p.x.data) + row_offset_of(p.shape, p.x, r);
  const E* up = gate + inner;
  E* out = static_cast<E*>(p.out.data) + row_offset_of(p.shape, p.out, r);
  Pack<E> g[kTilePacks], u[kTilePacks];
#pragma unroll
  for (int k = 0; k < kTilePacks; ++k) {
    const int i = first + k * step;
    g[k] = i < inner ? load_row_pack(gate, i, inner, a.packs) : Pack<E>{};
    u[k] = i < inner ? load_row_pack(up, i, inner, a.packs) : Pack<E>{};
  }
  grid_launch_dependents();
#pragma unroll
  for (int k = 0; k < kTilePacks; ++k) {
    if (p.activation == cpu::Activation::silu) {
      g[k] = gated_pack<cpu::Activation::silu>(g[k], u[k]);
    } else if (p.activation == cpu::Activation::gelu_erf) {
      g[k] = gated_pack<cpu::Activation::gelu_erf>(g[k], u[k]);
    } else {
      g[k] = gated_pack<cpu::Activation::gelu_tanh>(g[k], u[k]);
    }
    const int i = first + k * step;
    if (i < inner) store_row_pack(out, i, inner, a.packs, g[k]);
  }
}

}  // namespace

int gated_activation(const cpu::GatedParams& p, int64_t rows, void* stream) {
  return with_float(p.dtype, [&](auto element) {
    using E = decltype(element);
    const int64_t packs = ceil_div(p.inner, Pack<E>::kSize);
    GatedLaunch a{p, rows, false};
    a.packs = row_packs(p.shape, p.x, p.inner, sizeof(E)) &&
              row_packs(p.shape, p.out, p.inner, sizeof(E));
    const TileLayout tile = tile_layout(rows, packs, kTilePacks, kThreads, device_facts().sms);
    const dim3 grid(static_cast<unsigned>(ceil_div(rows, tile.rows)),
                    static_cast<unsigned>(ceil_div(packs, int64_t{tile.width} * kTilePacks)));
    return launch(gated_kernel<E>, grid, dim3(tile.width, tile.rows), 0, stream, a);
  });
}

}  // namespace fastinfer::cuda
