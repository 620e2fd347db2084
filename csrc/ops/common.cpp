// Message building for argument checks; see common.h.
#include "common.h"

namespace fastinfer {

namespace {

// torch's number of a dtype -> ours. Tensor::scalar_type() asks for the number of every dtype in
// turn, at each call; operators look at some thirty dtypes.
class DTypes {
 public:
  DTypes() {
    for (DType& t : of_) t = DType::other;
    const std::pair<int32_t, DType> known[] = {{aoti_torch_dtype_float32(), DType::f32},
                                               {aoti_torch_dtype_float16(), DType::f16},
                                               {aoti_torch_dtype_bfloat16(), DType::bf16},
                                               {aoti_torch_dtype_float8_e4m3fn(), DType::f8e4m3},
                                               {aoti_torch_dtype_int8(), DType::i8},
                                               {aoti_torch_dtype_uint8(), DType::u8},
                                               {aoti_torch_dtype_int32(), DType::i32},
                                               {aoti_torch_dtype_int64(), DType::i64},
                                               {aoti_torch_dtype_float64(), DType::f64},
                                               {aoti_torch_dtype_bool(), DType::boolean}};
    for (const auto& [number, type] : known)
      if (number >= 0 && number < kMost) of_[number] = type;
  }
  DType operator[](int32_t number) const {
    return number >= 0 && number < kMost ? of_[number] : DType::other;
  }

 private:
  static constexpr int32_t kMost = 128;
  DType of_[kMost];
};

int32_t dtype_number(const Tensor& t) {
  int32_t number = -1;
  aoti_torch_get_dtype(t.get(), &number);
  return number;
}

struct Place {
  int32_t type = -1, index = -1;
  bool operator==(const Place& other) const { return type == other.type && index == other.index; }
};

Place place_of(const Tensor& t) {
  static const int32_t cpu = aoti_torch_device_type_cpu();
  Place place;
  aoti_torch_get_device_type(t.get(), &place.type);
  if (place.type != cpu) aoti_torch_get_device_index(t.get(), &place.index);
  return place;
}

}  // namespace

DType dtype_of(const Tensor& t) {
  static const DTypes types;
  return types[dtype_number(t)];
}

namespace {

const char* name_of(DType t) {
  switch (t) {
    case DType::f32:
      return "torch.float32";
    case DType::f16:
      return "torch.float16";
    case DType::bf16:
      return "torch.bfloat16";
    case DType::f8e4m3:
      return "torch.float8_e4m3fn";
    case DType::i8:
      return "torch.int8";
    case DType::u8:
      return "torch.uint8";
    case DType::i32:
      return "torch.int32";
    case DType::i64:
      return "torch.int64";
    case DType::f64:
      return "torch.float64";
    case DType::boolean:
      return "torch.bool";
    default:
      return "an unsupported dtype";
  }
}

std::string device_of(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "device ") + std::to_string(t.get_device_index());
}

template <class Sizes>
std::string list(const Sizes& sizes, const char* wildcard) {
  std::ostringstream text;
  text << '[';
  bool first = true;
  for (int64_t s : sizes) {
    text << (first ? "" : ", ");
    if (s < 0)
      text << wildcard;
    else
      text << s;
    first = false;
  }
  text << ']';
  return text.str();
}

}  // namespace

const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Float8_e4m3fn:
      return "torch.float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "torch.float8_e5m2";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Short:
      return "torch.int16";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Bool:
      return "torch.bool";
    default:
      return "an unsupported dtype";
  }
}

std::string shape_of(const Tensor& t) { return list(t.sizes(), "*"); }

std::string describe(const Tensor& t) {
  return std::string(dtype_name(t.scalar_type())) + " " + shape_of(t) + " on " + device_of(t);
}

void check_given(const char* op, const char* arg, const Tensor& t) {
  FI_CHECK(t.defined(), op, ": ", arg, " must be a tensor, got None");
}

void check_last_dim(const char* op, const char* arg, const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  const size_t d = sizes.size();
  FI_CHECK(d > 0 && (sizes[d - 1] <= 1 || strides[d - 1] == 1 || t.numel() == 0), op, ": ", arg,
           " must be contiguous in its last dimension, got ", shape_of(t), " with strides ",
           list(t.strides(), "*"), "; call .contiguous() on it first");
}

void check_written(const char* op, const char* arg, const Tensor& t) {
  check_last_dim(op, arg, t);
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    FI_CHECK(sizes[d] <= 1 || strides[d] != 0, op, ": ", arg,
             " is written and must not repeat memory, got ", shape_of(t), " with strides ",
             list(t.strides(), "*"), "; call .contiguous() on it first");
}

namespace {

// First byte, and one past the last, that the elements of t touch.
std::pair<const char*, const char*> address_range(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
  const char* first = static_cast<const char*>(t.const_data_ptr());
  return {first, first + (last + 1) * static_cast<int64_t>(t.element_size())};
}

bool share_memory(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const auto [a_begin, a_end] = address_range(a);
  const auto [b_begin, b_end] = address_range(b);
  if (a_end <= b_begin || b_end <= a_begin) return false;
  // Slices of the columns of one buffer: rows start at multiples of one distance in both. A row may
  // take several dimensions, heads and their elements.
  const int64_t a_size = static_cast<int64_t>(a.element_size()),
                b_size = static_cast<int64_t>(b.element_size());
  int64_t dims = a.dim();
  if (b.dim() != dims) return true;
  int64_t a_row = a.size(dims - 1), b_row = b.size(dims - 1);
  for (; dims > 1 && a.stride(dims - 2) == a_row && b.stride(dims - 2) == b_row; --dims) {
    a_row *= a.size(dims - 2);
    b_row *= b.size(dims - 2);
  }
  int64_t row = 0;
  for (int64_t d = 0; d + 1 < dims; ++d) {
    if (a.size(d) != b.size(d)) return true;
    if (a.size(d) == 1) continue;
    const int64_t step = a.stride(d) * a_size;
    if (step != b.stride(d) * b_size || step <= 0) return true;
    row = row == 0 || step < row ? step : row;
  }
  if (row == 0) return true;
  for (int64_t d = 0; d + 1 < dims; ++d)
    if (a.size(d) > 1 && a.stride(d) * a_size % row != 0) return true;
  const int64_t apart = ((b_begin - a_begin) % row + row) % row;
  return apart < a_row * a_size || apart + b_row * b_size > row;
}

}  // namespace

void check_apart(const char* op, const char* out_arg, const Tensor& out,
                 std::initializer_list<std::pair<const char*, const Tensor*>> inputs) {
  for (const auto& [arg, t] : inputs)
    FI_CHECK(!t || !share_memory(out, *t), op, ": ", out_arg, " must not share memory with ", arg,
             ", which is read while ", out_arg, " is written; pass another tensor or none");
}

void check_apart_or_same(const char* op, const char* out_arg, const Tensor& out, const char* arg,
                         const Tensor& input) {
  bool same = out.const_data_ptr() == input.const_data_ptr();
  for (int64_t d = 0; d < out.dim(); ++d)
    same = same && (out.size(d) == 1 || out.stride(d) == input.stride(d));
  if (!same) check_apart(op, out_arg, out, {{arg, &input}});
}

void check_dim(const char* op, const char* arg, const Tensor& t, int64_t dim) {
  check_given(op, arg, t);
  FI_CHECK(t.dim() == dim, op, ": ", arg, " must have ", dim, " dimensions, got ", describe(t));
}

void check_dtype(const char* op, const char* arg, const Tensor& t,
                 std::initializer_list<DType> allowed) {
  check_given(op, arg, t);
  const DType got = dtype_of(t);
  for (DType a : allowed)
    if (a == got) return;
  std::string names;
  for (DType a : allowed) names += (names.empty() ? "" : " or ") + std::string(name_of(a));
  fail(op, ": ", arg, " must be ", names, ", got ", describe(t), "; convert it with .to(dtype)");
}

void check_same_dtype(const char* op, const char* arg, const Tensor& t, const char* like_arg,
                      const Tensor& like) {
  check_given(op, arg, t);
  check_given(op, like_arg, like);
  FI_CHECK(dtype_number(t) == dtype_number(like), op, ": ", arg, " must have the dtype of ",
           like_arg, " (", dtype_name(like.scalar_type()), "), got ", describe(t),
           "; convert one of them with .to(dtype)");
}

void check_shape(const char* op, const char* arg, const Tensor& t,
                 std::initializer_list<int64_t> want) {
  const auto sizes = t.sizes();
  bool ok = sizes.size() == want.size();
  size_t i = 0;
  if (ok)
    for (int64_t w : want) {
      ok = ok && (w < 0 || sizes[i] == w);
      ++i;
    }
  FI_CHECK(ok, op, ": ", arg, " must have shape ", list(want, "*"), ", got ", describe(t));
}

void check_device(const char* op, const Tensor& first,
                  std::initializer_list<std::pair<const char*, const Tensor*>> rest) {
  check_given(op, "its first tensor", first);
  const Place place = place_of(first);
  for (const auto& [arg, t] : rest) {
    if (!t) continue;
    check_given(op, arg, *t);
    FI_CHECK(place_of(*t) == place, op, ": ", arg,
             " must be on the same device as the first tensor (", device_of(first), "), got ",
             describe(*t), "; move it with .to(device)");
  }
}

void no_cuda_kernel(const char* op) {
  fail(op,
       ": this build has no CUDA kernel for this operator; move the tensors to the CPU, or install "
       "a build that has it ",
       "(`python -m fastinfer.env` lists what was built)");
}

}  // namespace fastinfer
