// repeat_kv, copy_blocks, swap_blocks: bytes move, nothing is computed, so any dtype goes and there
// is no kernel per instruction-set level.
//
//   repeat_kv     out[.., h * n_rep + r, ..] = x[.., h, ..] along `dim`
//   copy_blocks   cache[dst] = cache[src] for every cache of the list and every pair of
//                 block_mapping [n, 2]; swap_blocks: dst[i][d] = src[i][s]
//
// Work items: runs of contiguous bytes (repeat_kv), (cache, pair) for the others.
#include <algorithm>

#include "kv_cache.h"

#ifdef FASTINFER_WITH_CUDA
#include "cuda_shim.h"
#endif

namespace fastinfer {
namespace {

void repeat_kv(Tensor x, int64_t n_rep, int64_t dim, Tensor out) {
  const char* op = "repeat_kv";
  const int64_t n = x.dim(), d = dim < 0 ? dim + n : dim;
  FI_CHECK(n >= 2 && d >= 0 && d < n - 1, op,
           ": dim must name a dimension of x other than its last, got ", dim, " for x of ",
           describe(x));
  FI_CHECK(n_rep >= 1, op, ": n_rep must be at least 1, got ", n_rep);
  check_last_dim(op, "x", x);
  check_device(op, x, {{"out", &out}});
  check_same_dtype(op, "out", out, "x", x);
  bool ok = out.dim() == n;
  for (int64_t i = 0; ok && i < n; ++i) ok = out.size(i) == x.size(i) * (i == d ? n_rep : 1);
  FI_CHECK(ok, op, ": out must have the shape of x (", shape_of(x), ") with dimension ", d,
           " times ", n_rep, ", got ", describe(out));
  check_written(op, "out", out);
  check_apart(op, "out", out, {{"x", &x}});
  if (out.numel() == 0) return;
  std::vector<CopyDim> dims;
  if (!x.is_cpu()) {
    // Each element is read once: the repetition is a loop of the kernel, no dimension.
    for (int64_t i = 0; i < n; ++i)
      dims.push_back({x.size(i), x.stride(i), out.stride(i) * (i == d ? n_rep : 1)});
    return repeat_on_device(StridedCopy(dims, static_cast<int64_t>(x.element_size())), x, out,
                            n_rep, out.stride(d) * static_cast<int64_t>(x.element_size()));
  }
  for (int64_t i = 0; i < n; ++i) {
    dims.push_back({x.size(i), x.stride(i), out.stride(i) * (i == d ? n_rep : 1)});
    if (i == d) dims.push_back({n_rep, 0, out.stride(i)});
  }
  const StridedCopy copy(dims, static_cast<int64_t>(x.element_size()));
  const void* src = x.const_data_ptr();
  void* dst = out.mutable_data_ptr();
  torch::stable::parallel_for(0, copy.runs(), grain(copy.run_bytes()),
                              [&](int64_t begin, int64_t end) { copy(src, dst, begin, end); });
}

// `values` is t's data, or a copy of it, on the host. Ids inside [0, limit) on both sides.
BlockMapping read_mapping(const char* op, const Tensor& t, const void* values, int64_t src_blocks,
                          int64_t dst_blocks) {
  BlockMapping m;
  const int64_t n = t.size(0);
  const DType dtype = dtype_of(t);
  auto id = [&](int64_t i, int64_t side, const char* name, int64_t limit) {
    const int64_t v = index_at(values, dtype, i * t.stride(0) + side * t.stride(1));
    FI_CHECK(v >= 0 && v < limit, op, ": block_mapping must hold ", name, " blocks from 0 to ",
             limit - 1, ", got ", v, " at row ", i);
    return v;
  };
  m.src.reserve(static_cast<size_t>(n)), m.dst.reserve(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    m.src.push_back(id(i, 0, "source", src_blocks));
    m.dst.push_back(id(i, 1, "destination", dst_blocks));
  }
  return m;
}

// Pairs run in parallel: a destination that is named twice, or that is also a source, has no
// defined content.
void check_disjoint(const char* op, const BlockMapping& m, bool same_cache) {
  if (!validate_data()) return;
  std::vector<int64_t> dst = m.dst;
  std::sort(dst.begin(), dst.end());
  const auto twice = std::adjacent_find(dst.begin(), dst.end());
  FI_CHECK(twice == dst.end(), op, ": block_mapping must not name a destination twice, got block ",
           twice == dst.end() ? 0 : *twice, " more than once");
  if (!same_cache) return;
  for (int64_t s : m.src)
    FI_CHECK(!std::binary_search(dst.begin(), dst.end(), s), op,
             ": block_mapping must not use a block both as source and as destination, got block ",
             s, "; split the copies over two calls");
}

void check_mapping(const char* op, const Tensor& t) {
  check_dtype(op, "block_mapping", t, {DType::i32, DType::i64});
  check_shape(op, "block_mapping", t, {-1, 2});
}

void check_block_tensor(const char* op, const char* arg, size_t i, const Tensor& t) {
  FI_CHECK(t.dim() >= 1, op, ": ", arg, "[", i,
           "] must have the blocks as its first dimension, got ", describe(t));
}

// Moves block src[j] of cache `from` to block dst[j] of cache `to`, for every cache and j.
void move_blocks(const std::vector<Tensor>& from, const std::vector<Tensor>& to,
                 const BlockMapping& m) {
  struct Job {
    StridedCopy copy;
    const char* src;
    char* dst;
    int64_t src_block, dst_block;  // bytes
  };
  std::vector<Job> jobs;
  int64_t bytes = 0;
  for (size_t i = 0; i < to.size(); ++i) {
    const Tensor &s = from[i], &d = to[i];
    if (d.numel() == 0) continue;
    const int64_t element = static_cast<int64_t>(d.element_size());
    std::vector<CopyDim> dims;
    for (int64_t k = 1; k < d.dim(); ++k) dims.push_back({d.size(k), s.stride(k), d.stride(k)});
    jobs.push_back({StridedCopy(dims, element), static_cast<const char*>(s.const_data_ptr()),
                    static_cast<char*>(d.mutable_data_ptr()), s.stride(0) * element,
                    d.stride(0) * element});
    bytes += jobs.back().copy.runs() * jobs.back().copy.run_bytes();
  }
  const int64_t pairs = static_cast<int64_t>(m.src.size()),
                count = static_cast<int64_t>(jobs.size());
  if (pairs == 0 || count == 0) return;
  torch::stable::parallel_for(0, pairs * count, grain(bytes / count),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t item = begin; item < end; ++item) {
                                  const Job& job = jobs[static_cast<size_t>(item / pairs)];
                                  const size_t j = static_cast<size_t>(item % pairs);
                                  const char* src = job.src + m.src[j] * job.src_block;
                                  char* dst = job.dst + m.dst[j] * job.dst_block;
                                  if (src != dst) job.copy(src, dst, 0, job.copy.runs());
                                }
                              });
}

void copy_blocks(std::vector<Tensor> caches, Tensor block_mapping) {
  const char* op = "copy_blocks";
  check_mapping(op, block_mapping);
  FI_CHECK(!caches.empty(), op, ": caches must hold at least one tensor, got none");
  int64_t blocks = 0;
  for (size_t i = 0; i < caches.size(); ++i) {
    check_block_tensor(op, "caches", i, caches[i]);
    blocks = i == 0 ? caches[i].size(0) : std::min(blocks, caches[i].size(0));
    check_device(op, caches[0], {{"caches", &caches[i]}});
  }
  check_device(op, caches[0], {{"block_mapping", &block_mapping}});
  if (block_mapping.size(0) == 0) return;
  if (!caches[0].is_cpu()) {
#ifdef FASTINFER_WITH_CUDA
    if (validate_data()) {
      const CudaLaunch device(caches[0]);
      const HostCopy ids(op, "block_mapping", block_mapping, device.stream());
      check_disjoint(op, read_mapping(op, block_mapping, ids.data(), blocks, blocks), true);
    }
#endif
    return copy_blocks_on_device(caches, block_mapping, blocks);
  }
  const BlockMapping m =
      read_mapping(op, block_mapping, block_mapping.const_data_ptr(), blocks, blocks);
  check_disjoint(op, m, true);
  move_blocks(caches, caches, m);
}

void swap_blocks(std::vector<Tensor> src, std::vector<Tensor> dst, Tensor block_mapping) {
  const char* op = "swap_blocks";
  check_mapping(op, block_mapping);
  FI_CHECK(block_mapping.is_cpu(), op, ": block_mapping must be on the CPU, got ",
           describe(block_mapping), "; move it with .cpu()");
  FI_CHECK(!src.empty() && src.size() == dst.size(), op,
           ": src and dst must be lists of the same length, at least 1, got ", src.size(), " and ",
           dst.size());
  int64_t src_blocks = 0, dst_blocks = 0;
  bool same_cache = false;
  for (size_t i = 0; i < src.size(); ++i) {
    check_block_tensor(op, "src", i, src[i]);
    check_block_tensor(op, "dst", i, dst[i]);
    check_same_dtype(op, "dst", dst[i], "src", src[i]);
    bool same = src[i].dim() == dst[i].dim();
    for (int64_t d = 1; same && d < src[i].dim(); ++d) same = src[i].size(d) == dst[i].size(d);
    FI_CHECK(same, op, ": blocks of dst must have the shape of those of src, got src[", i, "] ",
             describe(src[i]), " and dst[", i, "] ", describe(dst[i]));
    src_blocks = i == 0 ? src[i].size(0) : std::min(src_blocks, src[i].size(0));
    dst_blocks = i == 0 ? dst[i].size(0) : std::min(dst_blocks, dst[i].size(0));
    same_cache = same_cache || src[i].const_data_ptr() == dst[i].const_data_ptr();
  }
  if (block_mapping.size(0) == 0) return;
  const BlockMapping m =
      read_mapping(op, block_mapping, block_mapping.const_data_ptr(), src_blocks, dst_blocks);
  check_disjoint(op, m, same_cache);
  std::vector<Tensor> on_cpu[2], with_device[2];
  for (size_t i = 0; i < src.size(); ++i) {
    auto& lists = src[i].is_cpu() && dst[i].is_cpu() ? on_cpu : with_device;
    lists[0].push_back(src[i]), lists[1].push_back(dst[i]);
  }
  move_blocks(on_cpu[0], on_cpu[1], m);
  if (!with_device[0].empty()) swap_blocks_with_device(with_device[0], with_device[1], m);
}

}  // namespace

FI_REGISTER_BOTH({
  m.impl("repeat_kv", TORCH_BOX(&repeat_kv));
  m.impl("copy_blocks", TORCH_BOX(&copy_blocks));
  m.impl("swap_blocks", TORCH_BOX(&swap_blocks));
})

}  // namespace fastinfer
