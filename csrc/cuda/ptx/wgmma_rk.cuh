// wgmma with A in registers and B K-major in shared memory: d[64][kN] (+)= A[64][16] B[kN][16]^T.
// Descriptors and fragments: wgmma.cuh.
#pragma once

#include "wgmma.cuh"

namespace fastinfer::cuda::ptx {

// clang-format off
#define FI_ACC8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define FI_ACC16(i) FI_ACC8(i), FI_ACC8(i + 8)
#define FI_ACC32(i) FI_ACC16(i), FI_ACC16(i + 16)
#define FI_ACC64(i) FI_ACC32(i), FI_ACC32(i + 32)
#define FI_ACC128 FI_ACC64(0), FI_ACC64(64)
#define FI_R0_7 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FI_R0_15 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FI_R16_31 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FI_R32_63 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FI_R64_127 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FI_WGMMA_RK(n, type, regs, acc, a0, a1, a2, a3, b_, keep_)                                \
  asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, %" keep_ ", 0;\n"                           \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" regs "}, "     \
               "{%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" b_ ", keep, 1, 1, 0;\n}"                 \
               : acc : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep))

// keep == 0: d is overwritten.
template <class T, int kN>
__device__ __forceinline__ void wgmma_rk(float (&d)[kN / 2], const uint32_t* a, uint64_t b, int keep) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  static_assert(kN == 16 || kN == 32 || kN == 64 || kN == 128 || kN == 256, "no such width");
  if constexpr (kN == 16) {
    if constexpr (kHalf)
      FI_WGMMA_RK("16", "f16", FI_R0_7, FI_ACC8(0), "8", "9", "10", "11", "12", "13");
    else
      FI_WGMMA_RK("16", "bf16", FI_R0_7, FI_ACC8(0), "8", "9", "10", "11", "12", "13");
  }
  else if constexpr (kN == 32) {
    if constexpr (kHalf)
      FI_WGMMA_RK("32", "f16", FI_R0_15, FI_ACC16(0), "16", "17", "18", "19", "20", "21");
    else
      FI_WGMMA_RK("32", "bf16", FI_R0_15, FI_ACC16(0), "16", "17", "18", "19", "20", "21");
  }
  else if constexpr (kN == 64) {
    if constexpr (kHalf)
      FI_WGMMA_RK("64", "f16", FI_R0_15 FI_R16_31, FI_ACC32(0), "32", "33", "34", "35", "36", "37");
    else
      FI_WGMMA_RK("64", "bf16", FI_R0_15 FI_R16_31, FI_ACC32(0), "32", "33", "34", "35", "36", "37");
  }
  else if constexpr (kN == 128) {
    if constexpr (kHalf)
      FI_WGMMA_RK("128", "f16", FI_R0_15 FI_R16_31 FI_R32_63, FI_ACC64(0), "64", "65", "66", "67", "68", "69");
    else
      FI_WGMMA_RK("128", "bf16", FI_R0_15 FI_R16_31 FI_R32_63, FI_ACC64(0), "64", "65", "66", "67", "68", "69");
  }
  else if constexpr (kN == 256) {
    if constexpr (kHalf)
      FI_WGMMA_RK("256", "f16", FI_R0_15 FI_R16_31 FI_R32_63 FI_R64_127, FI_ACC128, "128", "129", "130", "131", "132", "133");
    else
      FI_WGMMA_RK("256", "bf16", FI_R0_15 FI_R16_31 FI_R32_63 FI_R64_127, FI_ACC128, "128", "129", "130", "131", "132", "133");
  }
}
#undef FI_WGMMA_RK
#undef FI_ACC8
#undef FI_ACC16
#undef FI_ACC32
#undef FI_ACC64
#undef FI_ACC128
#undef FI_R0_7
#undef FI_R0_15
#undef FI_R16_31
#undef FI_R32_63
#undef FI_R64_127
// clang-format on

}  // namespace fastinfer::cuda::ptx
