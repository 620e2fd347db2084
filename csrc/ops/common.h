// Shared by every csrc/ops/<stem>.cpp: dtypes, argument checks with readable messages, registration
// helpers.
//
// A check is written for the person who called the Python function: operator, argument, what was
// expected, what came, how to fix it, in one sentence. fail() throws std::runtime_error, which
// torch turns into a Python RuntimeError with the text unchanged (STD_TORCH_CHECK would put a file
// name in front of it).
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/dtype.h"

namespace fastinfer {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// The condition is evaluated first; the message is only built on failure.
#define FI_CHECK(condition, ...)      \
  do {                                \
    if (!(condition)) [[unlikely]]    \
      ::fastinfer::fail(__VA_ARGS__); \
  } while (0)

// Our own dtype enum: CPU and CUDA kernels never see a torch header. DType::other is anything we
// have no use for.
DType dtype_of(const Tensor& t);
const char* dtype_name(ScalarType type);  // "torch.float16"
std::string shape_of(const Tensor& t);    // "[2, 3]"
std::string describe(const Tensor& t);    // "torch.float16 [2, 3] on cpu"

inline bool is_float(DType t) { return t == DType::f32 || t == DType::f16 || t == DType::bf16; }
inline bool is_8bit(DType t) { return t == DType::i8 || t == DType::f8e4m3; }

// Python's None arrives as an undefined tensor, on which every other question fails without a name.
void check_given(const char* op, const char* arg, const Tensor& t);
// Stride of the last dimension must be 1 (sizes 0 and 1 are always fine).
void check_last_dim(const char* op, const char* arg, const Tensor& t);
// The same, for a tensor that is written: no two elements may share memory (expand()).
void check_written(const char* op, const char* arg, const Tensor& t);
// `out` may not share memory with an input that is still read while `out` is written. Exact for
// rows of one stride (column slices of one buffer are apart), by address range otherwise.
void check_apart(const char* op, const char* out_arg, const Tensor& out,
                 std::initializer_list<std::pair<const char*, const Tensor*>> inputs);
// The same, but `out` may be the input itself: its rows are read before they are written.
void check_apart_or_same(const char* op, const char* out_arg, const Tensor& out, const char* arg,
                         const Tensor& input);
void check_dim(const char* op, const char* arg, const Tensor& t, int64_t dim);
void check_dtype(const char* op, const char* arg, const Tensor& t,
                 std::initializer_list<DType> allowed);
void check_same_dtype(const char* op, const char* arg, const Tensor& t, const char* like_arg,
                      const Tensor& like);
// The whole shape; -1 in `want` accepts any size there.
void check_shape(const char* op, const char* arg, const Tensor& t,
                 std::initializer_list<int64_t> want);
// Every defined tensor on the device of `first`.
void check_device(const char* op, const Tensor& first,
                  std::initializer_list<std::pair<const char*, const Tensor*>> rest);
inline const Tensor* ptr(const OptTensor& t) { return t ? &*t : nullptr; }
inline const void* data(const OptTensor& t) { return t ? t->const_data_ptr() : nullptr; }

// FASTINFER_VALIDATE=1: also look at the values in index tensors before running.
inline bool validate_data() {
  const char* v = std::getenv("FASTINFER_VALIDATE");
  return v && v[0] == '1';
}

// Value i of an int32 or int64 CPU index tensor with stride.
inline int64_t index_at(const void* p, DType t, int64_t i) {
  return t == DType::i64 ? static_cast<const int64_t*>(p)[i] : static_cast<const int32_t*>(p)[i];
}

// Raised by an operator for a CUDA tensor while it has no CUDA kernel in this build.
[[noreturn]] void no_cuda_kernel(const char* op);

// FI_CUDA(op, tensor, call): makes the tensor's device current, runs `call` (a launcher, which may
// name the current stream as `stream`) and raises on its error. Without CUDA in the build: raises.
#ifdef FASTINFER_WITH_CUDA
#define FI_CUDA(op, tensor, ...)                              \
  do {                                                        \
    const CudaLaunch fi_launch(tensor);                       \
    [[maybe_unused]] void* const stream = fi_launch.stream(); \
    check_launch(op, __VA_ARGS__);                            \
  } while (0)
#else
#define FI_CUDA(op, tensor, ...) no_cuda_kernel(op)
#endif

// Number of work items per thread so that a chunk moves at least ~32 KiB or 32k operations.
inline int64_t grain(int64_t cost_per_item) {
  const int64_t items = 32768 / (cost_per_item > 0 ? cost_per_item : 1);
  return items > 1 ? items : 1;
}

// The same boxed function under both keys: device choice is inside, after the checks.
#define FI_REGISTER_BOTH(...)                  \
  STABLE_TORCH_LIBRARY_IMPL(fastinfer, CPU, m) \
  __VA_ARGS__ STABLE_TORCH_LIBRARY_IMPL(fastinfer, CUDA, m) __VA_ARGS__

}  // namespace fastinfer
