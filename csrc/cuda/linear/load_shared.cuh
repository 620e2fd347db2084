// 16 bytes from shared memory; the read stays where it is among barriers and waits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastinfer::cuda {

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

}  // namespace fastinfer::cuda
