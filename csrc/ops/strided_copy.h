// Copies one strided region onto another of the same sizes, as runs of contiguous bytes; any dtype.
// Dimensions are ordered by the destination's strides and merged where both sides allow, so that a
// permuted but dense block is one run.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace fastinfer {

struct CopyDim {
  int64_t size, src_stride, dst_stride;  // elements; a source stride of 0 repeats
};

class StridedCopy {
 public:
  StridedCopy(std::vector<CopyDim> dims, int64_t element_size) : run_bytes_(element_size) {
    // Insertion sort: few dimensions, and equal strides must keep their order.
    for (size_t i = 1; i < dims.size(); ++i)
      for (size_t j = i; j > 0 && dims[j].dst_stride > dims[j - 1].dst_stride; --j)
        std::swap(dims[j], dims[j - 1]);
    int64_t run = 1;  // elements
    for (size_t i = dims.size(); i-- > 0;) {
      const CopyDim d = dims[i];
      if (d.size == 1) continue;
      if (outer_.empty() && d.src_stride == run && d.dst_stride == run) {
        run *= d.size;
        continue;
      }
      const int64_t src = d.src_stride * element_size, dst = d.dst_stride * element_size;
      if (!outer_.empty()) {
        CopyDim& inner = outer_.back();
        if (src == inner.src_stride * inner.size && dst == inner.dst_stride * inner.size) {
          inner.size *= d.size;
          continue;
        }
      }
      outer_.push_back({d.size, src, dst});  // innermost first, strides in bytes
    }
    run_bytes_ = run * element_size;
    for (const CopyDim& d : outer_) runs_ *= d.size;
  }

  int64_t runs() const { return runs_; }
  int64_t run_bytes() const { return run_bytes_; }
  // Dimensions around a run, innermost first, strides in bytes.
  const std::vector<CopyDim>& outer() const { return outer_; }

  void operator()(const void* src, void* dst, int64_t begin, int64_t end) const {
    for (int64_t r = begin; r < end; ++r) {
      int64_t from = 0, to = 0, rest = r;
      for (const CopyDim& d : outer_) {
        const int64_t i = rest % d.size;
        rest /= d.size;
        from += i * d.src_stride;
        to += i * d.dst_stride;
      }
      std::memcpy(static_cast<char*>(dst) + to, static_cast<const char*>(src) + from,
                  static_cast<size_t>(run_bytes_));
    }
  }

 private:
  std::vector<CopyDim> outer_;
  int64_t run_bytes_, runs_ = 1;
};

}  // namespace fastinfer
