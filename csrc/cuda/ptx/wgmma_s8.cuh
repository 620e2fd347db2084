// wgmma on int8: a warpgroup adds the product of a 64 x 32 block of A and a 32 x N block of B, both
// K-major in shared memory, to int32 accumulators, asynchronously. Descriptors, accumulator layout
// and the fences around it: wgmma.cuh; slabs are [rows][128 bytes], the next 32 columns + 32 bytes.
// Sums wrap (no saturation).
#pragma once

#include <cstdint>

#include "wgmma.cuh"

namespace fastinfer::cuda::ptx {

template <int kN>
__device__ __forceinline__ void hold(int32_t (&r)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) asm volatile("" : "+r"(r[i])::"memory");
}

// clang-format off
#define FI_I8(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]), "+r"(d[i + 7])
#define FI_I32(i) FI_I8(i), FI_I8(i + 8), FI_I8(i + 16), FI_I8(i + 24)
#define FI_WGMMA_S8(n, regs, a_, b_, keep_, ...)                                                  \
  asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, %" keep_ ", 0;\n"                          \
               "wgmma.mma_async.sync.aligned.m64n" n "k32.s32.s8.s8 {" regs "}, "                 \
               "%" a_ ", %" b_ ", keep;\n}"                                                       \
               : __VA_ARGS__ : "l"(a), "l"(b), "r"(keep))
#define FI_R0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FI_R32 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FI_R64 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FI_R96 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// d (+)= A B^T; keep == 0 starts from zero.
template <int kN>
__device__ __forceinline__ void wgmma_s8(int32_t (&d)[kN / 2], uint64_t a, uint64_t b, int keep) {
  if constexpr (kN == 64)
    FI_WGMMA_S8("64", FI_R0, "32", "33", "34", FI_I32(0));
  else if constexpr (kN == 128)
    FI_WGMMA_S8("128", FI_R0 ", " FI_R32, "64", "65", "66", FI_I32(0), FI_I32(32));
  else if constexpr (kN == 192)
    FI_WGMMA_S8("192", FI_R0 ", " FI_R32 ", " FI_R64, "96", "97", "98", FI_I32(0), FI_I32(32), FI_I32(64));
  else if constexpr (kN == 256)
    FI_WGMMA_S8("256", FI_R0 ", " FI_R32 ", " FI_R64 ", " FI_R96, "128", "129", "130", FI_I32(0), FI_I32(32), FI_I32(64), FI_I32(96));
  else
    static_assert(kN == 128, "no such width");
}
#undef FI_WGMMA_S8
#undef FI_I8
#undef FI_I32
#undef FI_R0
#undef FI_R32
#undef FI_R64
#undef FI_R96
// clang-format on

}  // namespace fastinfer::cuda::ptx
