// Launchers of csrc/cuda/sampling for csrc/ops/sampling.cpp: the params structs of the CPU kernels
// with device pointers. Return a cudaError_t.
#pragma once

#include "../../cpu/sampling.h"

namespace fastinfer::cuda {

int launch_sample(const cpu::SampleParams& p, int64_t batch, void* stream);
int launch_verify_draft(const cpu::VerifyParams& p, int64_t batch, void* stream);

// CTAs that share one row (a power of two <= 8): enough to fill the GPU, each with work to do.
int sampling_ctas_per_row(int64_t rows, int64_t vocab, int sms);

}  // namespace fastinfer::cuda
