// cpu_isa, build_info and cuda_probe: what was built, what runs. fastinfer.env prints them.
#include "../cpu/isa.h"
#include "common.h"
#ifdef FASTINFER_WITH_CUDA
#include "../cuda/common/launch.h"
#include "cuda_shim.h"
#endif

namespace fastinfer {
namespace {

std::string cpu_isa() { return cpu::isa_name(); }

// "key=value" entries.
std::vector<std::string> build_info() {
  std::vector<std::string> info = {
      std::string("version=") + FASTINFER_VERSION,
      std::string("compiler=") + FASTINFER_COMPILER,
      std::string("torch=") + FASTINFER_TORCH_VERSION,
      std::string("torch_target=2.11"),
  };
#ifdef FASTINFER_WITH_CUDA
  info.push_back(std::string("cuda_toolkit=") + cuda::toolkit_version());
  info.push_back(std::string("cuda_archs=") + FASTINFER_CUDA_ARCHS);
  info.push_back("cuda_driver=" + std::to_string(cuda::driver_version()));
#endif
  return info;
}

// Programmatic dependent launch for the calling thread's launches (csrc/cuda/common/launch.cuh);
// returns what it was before. Without CUDA in the build nothing is launched, and it stays off.
bool set_programmatic_launch(bool on) {
#ifdef FASTINFER_WITH_CUDA
  return cuda::set_programmatic_launch(on);
#else
  return false;
#endif
}

// out int32 [2]: __CUDA_ARCH__ of the portable and of the sm_90a code that ran; an entry stays as
// it was where there is none for this GPU. On the CPU: zeros.
void cuda_probe(Tensor out) {
  const char* op = "cuda_probe";
  check_dtype(op, "out", out, {DType::i32});
  check_shape(op, "out", out, {2});
  FI_CHECK(out.is_contiguous(), op, ": out must be contiguous, got ", describe(out));
  if (out.is_cpu()) {
    static_cast<int32_t*>(out.mutable_data_ptr())[0] =
        static_cast<int32_t*>(out.mutable_data_ptr())[1] = 0;
    return;
  }
#ifdef FASTINFER_WITH_CUDA
  const CudaLaunch launch(out);
  int32_t* p = static_cast<int32_t*>(out.mutable_data_ptr());
  check_launch(op, cuda::launch_probe_portable(p, launch.stream()));
#ifdef FASTINFER_HAVE_SM90A
  constexpr int kNoBinary = 209;
  const int error = cuda::launch_probe_sm90a(p + 1, launch.stream());
  if (error != kNoBinary) check_launch(op, error);
#endif
#else
  no_cuda_kernel(op);
#endif
}

}  // namespace

// Queries without a tensor argument have no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(fastinfer, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("set_programmatic_launch", TORCH_BOX(&set_programmatic_launch));
}

FI_REGISTER_BOTH({ m.impl("cuda_probe", TORCH_BOX(&cuda_probe)); })

}  // namespace fastinfer
