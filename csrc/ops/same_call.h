// What the checks of a call looked at, to be compared with the thread's last call that passed them:
// the layers of a model call with the same shapes over and over, and then only addresses differ.
// Checks and parameters of nine tensors take the host three times as long as this.
#pragma once

#include <cstring>

#include "common.h"

namespace fastinfer {

// Dtype, device, sizes and strides of up to kTensors tensors of at most four dimensions, and one
// number of the caller's. Plain data: a thread's last call is a thread_local of zeros at first,
// which equals nothing.
template <int kTensors>
struct CallShape {
  static constexpr int kDims = 4, kWords = 1 + 2 * kDims;
  int64_t count, number, word[kTensors][kWords];

  // False where a call cannot be described (an undefined tensor, five dimensions): it is then never
  // like another. Null: an argument that is not given.
  bool read(int64_t caller, std::initializer_list<const Tensor*> tensors) {
    static const int32_t cpu = aoti_torch_device_type_cpu();
    count = 0, number = caller;
    for (const Tensor* t : tensors) {
      int64_t* at = word[count++];
      std::memset(at, 0, sizeof(word[0]));
      if (!t) continue;
      const AtenTensorHandle handle = t->get();
      int32_t dtype = 0, device = 0, index = 0;
      int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
      bool defined = false;
      if (aoti_torch_is_defined(handle, &defined) || !defined ||
          aoti_torch_get_dtype(handle, &dtype) || aoti_torch_get_device_type(handle, &device) ||
          (device != cpu && aoti_torch_get_device_index(handle, &index)) ||
          aoti_torch_get_dim(handle, &dim) || dim > kDims || aoti_torch_get_sizes(handle, &sizes) ||
          aoti_torch_get_strides(handle, &strides)) {
        count = 0;
        return false;
      }
      at[0] = 1 | dtype << 1 | device << 9 | index << 17 | dim << 32;
      for (int64_t d = 0; d < dim; ++d) at[1 + d] = sizes[d], at[1 + kDims + d] = strides[d];
    }
    return true;
  }
  bool operator==(const CallShape& other) const {
    return count != 0 && count == other.count && number == other.number &&
           std::memcmp(word, other.word, count * sizeof(word[0])) == 0;
  }
};

}  // namespace fastinfer
