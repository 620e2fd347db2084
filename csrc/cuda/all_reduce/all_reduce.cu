// Launches of all_reduce.cuh: tiles and grids.
#include "all_reduce.h"

#include "all_reduce_few.cuh"

namespace fastinfer::cuda {
namespace {

template <class E>
AllReduceLaunch launch_of(const AllReduceParams& p) {
  constexpr int64_t kSize = Pack<E>::kSize;
  const PeerGroup& g = *p.group;
  AllReduceLaunch a{};
  for (int r = 0; r < g.world; ++r) a.ranks[r] = g.ranks[r];
  a.rank = g.rank, a.world = g.world;
  a.two_shot = p.two_shot && g.world > 1;
  a.aligned = packs_fit(p.x, 0, sizeof(E), {p.rows == 1 ? 0 : p.stride});
  a.slot_bytes = g.slot_bytes, a.limit_ns = g.limit_ns, a.failed = g.failed;
  a.x = p.x, a.x_stride = p.stride;
  a.dim = p.dim, a.row_units = ceil_div(p.dim, kSize), a.units = p.rows * a.row_units;
  return a;
}

// All blocks on the GPU at once: registers allow two of 512 threads per multiprocessor.
unsigned grid_of(int64_t tiles, int threads) {
  const int64_t most = int64_t{device_facts().sms} * (threads <= 512 ? 2 : 1);
  return static_cast<unsigned>(tiles < most ? tiles : most);
}

template <class E, bool kNorm>
int run(const AllReduceLaunch& a, int threads, void* stream) {
  const unsigned grid = grid_of(a.tiles, threads);
  if (few_tiles<E>(a, kNorm, grid)) {
    if (a.world == 2)
      return launch(all_reduce_few_kernel<E, 2, kNorm>, grid, threads, 0, stream, a);
    return launch(all_reduce_few_kernel<E, kMaxRanks, kNorm>, grid, threads, 0, stream, a);
  }
  return launch(all_reduce_kernel<E, kNorm>, grid, threads, 0, stream, a);
}

// Small messages in small blocks, so that they reach several multiprocessors. Tiles decide who owns
// what in two-shot: they depend on the message alone, not on the GPU.
int tile_threads(int64_t units) {
  int threads = 128;
  while (threads < 512 && ceil_div(units, threads) > 128) threads *= 2;
  return threads;
}

}  // namespace

int64_t all_reduce_slot_bytes(int64_t rows, int64_t dim, DType dtype) {
  const int64_t size = dtype == DType::f32 ? 4 : 8;
  return rows * ceil_div(dim, size) * 16;
}

bool all_reduce_norm_fits(const AllReduceParams& p, const AddNormParams& n) {
  const int64_t bytes = dtype_size(p.dtype);
  return p.dim > 0 && p.dim * bytes % 16 == 0 && p.dim * bytes <= 16 * kMaxTileThreads &&
         packs_fit(p.x, p.dim, bytes, {p.stride}) &&
         packs_fit(n.residual, p.dim, bytes, {n.stride}) && packs_fit(n.weight, p.dim, bytes, {});
}

int all_reduce(const AllReduceParams& p, void* stream) {
  return with_float(p.dtype, [&](auto element) {
    using E = decltype(element);
    AllReduceLaunch a = launch_of<E>(p);
    const int threads = tile_threads(a.units);
    a.tiles = static_cast<uint32_t>(ceil_div(a.units, threads));
    return run<E, false>(a, threads, stream);
  });
}

int all_reduce_add_rms_norm(const AllReduceParams& p, const AddNormParams& n, void* stream) {
  return with_float(p.dtype, [&](auto element) {
    using E = decltype(element);
    AllReduceLaunch a = launch_of<E>(p);
    a.residual = n.residual, a.residual_stride = n.stride, a.weight = n.weight, a.eps = n.eps;
    a.inverse_dim = 1.0f / static_cast<float>(p.dim);
    a.tiles = static_cast<uint32_t>(p.rows);
    return run<E, true>(a, static_cast<int>(ceil_div(a.row_units, 32) * 32), stream);
  });
}

}  // namespace fastinfer::cuda
