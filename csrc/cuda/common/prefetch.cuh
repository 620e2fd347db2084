// Memory that a later block will read, asked for by this one: its loads then find it in L2. Work
// that has to see its data before it can write holds few bytes under way per multiprocessor.
#pragma once

#include <cstdint>

namespace fastinfer::cuda {

// Both ends at multiples of 16 bytes. Nothing where no single instruction does it.
__device__ __forceinline__ void prefetch_l2(const void* p, uint32_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
#endif
}

}  // namespace fastinfer::cuda
