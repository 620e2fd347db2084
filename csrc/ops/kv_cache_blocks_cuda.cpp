// The CUDA side of kv_cache_blocks.cpp: which tensors share a launch, and how blocks travel between
// the host, a device and its peers.
//
// Tensors whose blocks have the same layout go into one launch, whatever their number; caches of a
// model all do. swap_blocks with pinned host memory: blocks scattered over the host are read or
// written by a kernel (about 50 GB/s on a PCIe 5 link); long stretches of host blocks go through a
// buffer on the device and large copies (54 GB/s), directly where both sides hold them in a row.
// Pageable memory: the same, or one copy per block. Other devices: cudaMemcpyAsync per stretch.
#include <algorithm>

#include "cuda_shim.h"
#include "kv_cache.h"

#ifdef FASTINFER_WITH_CUDA
#include "../cuda/kv_cache/kv_cache.h"
#endif

namespace fastinfer {

#ifdef FASTINFER_WITH_CUDA
namespace {

// f(shape, src offset, dst offset) for the up to kMaxDims innermost outer dimensions of a copy; the
// ones further out are a loop on the host (no cache layout in use has as many).
template <class F>
void for_each_shape(const StridedCopy& copy, const F& f) {
  cuda::CopyShape shape{};
  const std::vector<CopyDim>& outer = copy.outer();
  shape.run_bytes = copy.run_bytes();
  const size_t inner = std::min<size_t>(outer.size(), cuda::CopyShape::kMaxDims);
  shape.dims = static_cast<int>(inner);
  for (size_t d = 0; d < inner; ++d) {
    shape.size[d] = outer[d].size;
    shape.src_stride[d] = outer[d].src_stride, shape.dst_stride[d] = outer[d].dst_stride;
  }
  int64_t count = 1;
  for (size_t d = inner; d < outer.size(); ++d) count *= outer[d].size;
  for (int64_t n = 0; n < count; ++n) {
    int64_t rest = n, src = 0, dst = 0;
    for (size_t d = inner; d < outer.size(); ++d) {
      src += rest % outer[d].size * outer[d].src_stride;
      dst += rest % outer[d].size * outer[d].dst_stride;
      rest /= outer[d].size;
    }
    f(shape, src, dst);
  }
}

// How a block of `src` becomes one of `dst`: equal for tensors that can share a launch.
struct Layout {
  std::vector<int64_t> key;

  Layout(const Tensor& src, const Tensor& dst) {
    key = {static_cast<int64_t>(dst.element_size()), src.stride(0), dst.stride(0)};
    for (int64_t d = 1; d < dst.dim(); ++d)
      key.insert(key.end(), {dst.size(d), src.stride(d), dst.stride(d)});
  }
  StridedCopy block() const {
    std::vector<CopyDim> dims;
    for (size_t i = 3; i < key.size(); i += 3) dims.push_back({key[i], key[i + 1], key[i + 2]});
    return StridedCopy(dims, key[0]);
  }
  int64_t src_block() const { return key[0] * key[1]; }
  int64_t dst_block() const { return key[0] * key[2]; }
  // Are the blocks of one side dense and next to each other? side: 1 source, 2 destination.
  bool dense(size_t side) const {
    int64_t expected = 1;
    for (size_t i = key.size(); i > 3; i -= 3) {
      if (key[i - 3] != 1 && key[i - 3 + side] != expected) return false;
      expected *= key[i - 3];
    }
    return key[side] == expected;
  }
  bool operator==(const Layout& other) const { return key == other.key; }
};

struct Group {
  Layout layout;
  std::vector<const char*> src;
  std::vector<char*> dst;
  Tensor anchor;                   // says where to launch
  int32_t src_device, dst_device;  // -1: host
  bool by_kernel;
};

int32_t device_of(const Tensor& t) { return t.is_cpu() ? -1 : t.get_device_index(); }

// Bytes from the first to the last element, for tensors of non-negative strides (torch has no
// others).
int64_t span_bytes(const Tensor& t) {
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  return (last + 1) * static_cast<int64_t>(t.element_size());
}

// Joins tensor pairs that can share a launch.
void add(std::vector<Group>& groups, const Tensor& s, const Tensor& d, bool by_kernel) {
  const Layout layout(s, d);
  const int32_t src_device = device_of(s), dst_device = device_of(d);
  Group* group = nullptr;
  for (Group& g : groups)
    if (g.layout == layout && g.src_device == src_device && g.dst_device == dst_device &&
        g.by_kernel == by_kernel)
      group = &g;
  if (!group) {
    groups.push_back({layout, {}, {}, src_device >= 0 ? s : d, src_device, dst_device, by_kernel});
    group = &groups.back();
  }
  group->src.push_back(static_cast<const char*>(s.const_data_ptr()));
  group->dst.push_back(static_cast<char*>(d.mutable_data_ptr()));
}

// Large copies pay off from these sizes on (pinned memory; pageable memory has no other way).
// A kernel writes to the host faster than it reads from there.
constexpr int64_t kLongStretch = 512 << 10, kStagingBytes = 64 << 20, kMostBlock = 1 << 30;
constexpr int64_t least_staged(bool into_host) { return (into_host ? 16 : 6) << 20; }

// Mean bytes of a stretch: consecutive ids in `a` and, where given, in `b`.
int64_t mean_stretch(int64_t block, const std::vector<int64_t>& a, const std::vector<int64_t>* b) {
  int64_t stretches = 1;
  for (size_t i = 1; i < a.size(); ++i)
    stretches += a[i] != a[i - 1] + 1 || (b && (*b)[i] != (*b)[i - 1] + 1);
  return block * static_cast<int64_t>(a.size()) / stretches;
}

// The pairs by ascending id on the host.
BlockMapping by_host_id(const BlockMapping& m, bool into_host) {
  const std::vector<int64_t>& key = into_host ? m.dst : m.src;
  if (std::is_sorted(key.begin(), key.end())) return m;
  std::vector<size_t> order(key.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return key[a] != key[b] ? key[a] < key[b] : a < b; });
  BlockMapping sorted;
  for (const size_t i : order) {
    sorted.src.push_back(m.src[i]);
    sorted.dst.push_back(m.dst[i]);
  }
  return sorted;
}

// Large copies through a buffer; `m` sorted, the host side dense.
void copy_staged(const char* op, const Group& g, const BlockMapping& m, void* stream) {
  const bool into_host = g.dst_device < 0;
  const int64_t host_block = into_host ? g.layout.dst_block() : g.layout.src_block();
  const int64_t device_block = into_host ? g.layout.src_block() : g.layout.dst_block();
  const int64_t pairs = static_cast<int64_t>(m.src.size());
  const int64_t slab = std::min(pairs, std::max<int64_t>(1, kStagingBytes / host_block));
  const int64_t bytes = slab * host_block;
  const Tensor staging = torch::stable::new_empty(g.anchor, {bytes}, ScalarType::Byte);
  for_each_shape(g.layout.block(), [&](const cuda::CopyShape& shape, int64_t, int64_t) {
    for (size_t t = 0; t < g.src.size(); ++t) {
      char* host = into_host ? g.dst[t] : const_cast<char*>(g.src[t]);
      char* device = into_host ? const_cast<char*>(g.src[t]) : g.dst[t];
      for (int64_t first = 0; first < pairs; first += slab)
        check_launch(
            op, cuda::launch_staged_swap(shape, device_block, host_block, device, host, into_host,
                                         g.by_kernel, (into_host ? m.src : m.dst).data() + first,
                                         (into_host ? m.dst : m.src).data() + first,
                                         std::min(slab, pairs - first),
                                         static_cast<char*>(staging.mutable_data_ptr()), stream));
    }
  });
}

// One copy per contiguous stretch: whole runs of consecutive blocks where blocks are dense.
void copy_by_memcpy(const char* op, const Group& g, const BlockMapping& m, void* stream) {
  const StridedCopy block = g.layout.block();
  const int64_t bytes = block.run_bytes(), src_step = g.layout.src_block(),
                dst_step = g.layout.dst_block();
  const bool dense = block.outer().empty() && src_step == bytes && dst_step == bytes;
  const size_t pairs = m.src.size();
  for (size_t t = 0; t < g.src.size(); ++t) {
    for (size_t i = 0, n; i < pairs; i += n) {
      n = 1;
      while (dense && i + n < pairs && m.src[i + n] == m.src[i] + static_cast<int64_t>(n) &&
             m.dst[i + n] == m.dst[i] + static_cast<int64_t>(n))
        ++n;
      const char* src = g.src[t] + m.src[i] * src_step;
      char* dst = g.dst[t] + m.dst[i] * dst_step;
      for (int64_t r = 0; r < block.runs(); ++r) {
        int64_t from = 0, to = 0, rest = r;
        for (const CopyDim& d : block.outer()) {
          from += rest % d.size * d.src_stride;
          to += rest % d.size * d.dst_stride;
          rest /= d.size;
        }
        check_launch(
            op, cuda::copy_async(dst + to, src + from, bytes * static_cast<int64_t>(n), stream));
      }
    }
  }
}

}  // namespace

void copy_blocks_on_device(const std::vector<Tensor>& caches, const Tensor& mapping,
                           int64_t num_blocks) {
  const char* op = "copy_blocks";
  std::vector<Group> groups;
  for (const Tensor& t : caches)
    if (t.numel() > 0) add(groups, t, t, true);
  const CudaLaunch device(mapping);
  const cuda::DeviceMapping pairs{mapping.const_data_ptr(), dtype_of(mapping), mapping.stride(0),
                                  mapping.stride(1), mapping.size(0)};
  for (Group& g : groups) {
    for_each_shape(g.layout.block(), [&](const cuda::CopyShape& shape, int64_t offset, int64_t) {
      std::vector<char*> at = g.dst;
      for (char*& p : at) p += offset;
      check_launch(
          op, cuda::launch_copy_blocks(shape, g.layout.src_block(), num_blocks, at.data(),
                                       static_cast<int64_t>(at.size()), pairs, device.stream()));
    });
  }
}

void swap_blocks_with_device(const std::vector<Tensor>& src, const std::vector<Tensor>& dst,
                             const BlockMapping& m) {
  const char* op = "swap_blocks";
  std::vector<Group> groups;
  for (size_t i = 0; i < src.size(); ++i) {
    const Tensor &s = src[i], &d = dst[i];
    if (d.numel() == 0 || s.numel() == 0) continue;
    auto reachable = [](const Tensor& t, const Tensor& other) {
      if (t.is_cpu()) return cuda::is_pinned(t.const_data_ptr(), span_bytes(t));
      return other.is_cpu() || device_of(t) == device_of(other);
    };
    add(groups, s, d, reachable(s, d) && reachable(d, s));
  }
  for (const Group& g : groups) {
    const CudaLaunch device(g.anchor);
    const bool two_devices = g.src_device >= 0 && g.dst_device >= 0 && g.src_device != g.dst_device;
    void* other = two_devices ? current_stream(g.dst_device) : nullptr;
    if (two_devices) check_launch(op, cuda::order_streams(other, g.dst_device, device.stream()));
    const bool over_pcie = g.src_device < 0 || g.dst_device < 0, into_host = g.dst_device < 0;
    bool by_kernel = g.by_kernel, staged = false;
    BlockMapping sorted;
    if (over_pcie && g.layout.dense(into_host ? 2 : 1) &&
        g.layout.block().outer().size() <= cuda::CopyShape::kMaxDims) {
      sorted = by_host_id(m, into_host);
      const int64_t block = into_host ? g.layout.dst_block() : g.layout.src_block();
      const int64_t least = by_kernel ? least_staged(into_host) : 0;
      staged = block < kMostBlock && block * static_cast<int64_t>(m.src.size()) >= least &&
               mean_stretch(block, into_host ? sorted.dst : sorted.src, nullptr) >= kLongStretch;
      if (g.layout.dense(into_host ? 1 : 2) &&
          mean_stretch(block, sorted.src, &sorted.dst) >= kLongStretch)
        by_kernel = staged = false;
    }
    if (staged) {
      copy_staged(op, g, sorted, device.stream());
    } else if (by_kernel) {
      for_each_shape(g.layout.block(), [&](const cuda::CopyShape& shape, int64_t from, int64_t to) {
        std::vector<const char*> a = g.src;
        std::vector<char*> b = g.dst;
        for (const char*& p : a) p += from;
        for (char*& p : b) p += to;
        check_launch(op, cuda::launch_swap_blocks(
                             shape, g.layout.src_block(), g.layout.dst_block(), a.data(), b.data(),
                             static_cast<int64_t>(a.size()), m.src.data(), m.dst.data(),
                             static_cast<int64_t>(m.src.size()), over_pcie, device.stream()));
      });
    } else {
      copy_by_memcpy(op, g, sorted.src.empty() ? m : sorted, device.stream());
    }
    if (two_devices) check_launch(op, cuda::order_streams(device.stream(), g.src_device, other));
  }
}

void repeat_on_device(const StridedCopy& copy, const Tensor& x, const Tensor& out, int64_t n_rep,
                      int64_t rep_stride) {
  const CudaLaunch device(x);
  const char* src = static_cast<const char*>(x.const_data_ptr());
  char* dst = static_cast<char*>(out.mutable_data_ptr());
  for_each_shape(copy, [&](const cuda::CopyShape& shape, int64_t from, int64_t to) {
    check_launch("repeat_kv", cuda::launch_repeat(shape, src + from, dst + to, n_rep, rep_stride,
                                                  device.stream()));
  });
}

#else

void copy_blocks_on_device(const std::vector<Tensor>&, const Tensor&, int64_t) {
  no_cuda_kernel("copy_blocks");
}
void swap_blocks_with_device(const std::vector<Tensor>&, const std::vector<Tensor>&,
                             const BlockMapping&) {
  no_cuda_kernel("swap_blocks");
}
void repeat_on_device(const StridedCopy&, const Tensor&, const Tensor&, int64_t, int64_t) {
  no_cuda_kernel("repeat_kv");
}

#endif

}  // namespace fastinfer
