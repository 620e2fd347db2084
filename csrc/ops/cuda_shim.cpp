// See cuda_shim.h. Without CUDA in the build this file is empty.
#ifdef FASTINFER_WITH_CUDA
#include "cuda_shim.h"

#include <dlfcn.h>

#include "../cuda/common/launch.h"

namespace fastinfer {
namespace {

using GetStream = int32_t (*)(int32_t, void**);

GetStream find_get_stream() {
  // RTLD_NOLOAD: only what `import torch` already brought in, nothing is ever loaded here.
  void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return torch_cuda
             ? reinterpret_cast<GetStream>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"))
             : nullptr;
}

}  // namespace

void* current_stream(int32_t device) {
  static const GetStream get = find_get_stream();
  FI_CHECK(get,
           "fastinfer: this torch has no CUDA runtime (libtorch_cuda.so is not loaded); install a "
           "CUDA build of torch >= 2.11");
  void* stream = nullptr;
  FI_CHECK(get(device, &stream) == 0,
           "fastinfer: torch could not give its current stream on cuda:", device);
  return stream;
}

void check_launch(const char* op, int error) {
  if (error == 0) return;
  constexpr int kNoBinary = 209;
  if (error == kNoBinary)
    fail(op, ": no code for this GPU in this build, which holds ", FASTINFER_CUDA_ARCHS,
         "; rebuild with FASTINFER_CUDA_ARCHS set to the GPU's compute capability");
  fail(op, ": CUDA error ", error, " (", cuda::error_text(error), ")");
}

HostCopy::HostCopy(const char* op, const char* arg, const Tensor& t, void* stream) {
  FI_CHECK(!cuda::is_capturing(stream), op, ": FASTINFER_VALIDATE=1 reads ", arg,
           " on the host, which a CUDA graph cannot capture; unset it while capturing");
  if (t.numel() == 0) return;
  int64_t span = 1;
  for (int64_t d = 0; d < t.dim(); ++d) span += (t.size(d) - 1) * t.stride(d);
  bytes_.resize(static_cast<size_t>(span * static_cast<int64_t>(t.element_size())));
  check_launch(op, cuda::copy_to_host(bytes_.data(), t.const_data_ptr(), bytes_.size(), stream));
}

}  // namespace fastinfer
#endif
