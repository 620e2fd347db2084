// wgmma: a warpgroup (4 warps) multiplies a 64 x 16 block of A with a 16 x N block of B in shared
// memory and adds into fp32 accumulators, asynchronously.
//
// Shared-memory operands are named by 64-bit descriptors of 128-byte-swizzled slabs, [rows][64]
// elements each, base aligned to 1024 bytes (what a TMA box of 64 columns leaves behind):
//   K-major (Q, K): rows are M or N; 8 rows are 1024 bytes apart. The next 16 columns: + 32 bytes.
//   N-major (V as B): rows are K; the next 64 columns of N are one slab further. The next 16 rows:
//   + 2048 bytes.
// Accumulator 4 j + e of a thread: row 16 warp + lane / 4 + 8 (e / 2), column 8 j + 2 (lane % 4) +
// e % 2. Packed in pairs this is also the layout of A in registers.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace fastinfer::cuda::ptx {

// Before the first wgmma of a batch, and whenever its registers were written since.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// The registers of a wgmma in flight: keeps the compiler from moving uses across this point.
template <int kN>
__device__ __forceinline__ void hold(float (&r)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) asm volatile("" : "+f"(r[i])::"memory");
}
template <int kN>
__device__ __forceinline__ void hold(uint32_t (&r)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) asm volatile("" : "+r"(r[i])::"memory");
}

// A value that all lanes of the warp share, in a form from which the compiler sees it: descriptors
// made of it are computed in uniform registers (one instruction between two wgmma instead of seven,
// and none of the registers that accumulators need).
__device__ __forceinline__ uint32_t uniform(uint32_t x) { return __shfl_sync(0xffffffffu, x, 0); }

// Descriptor of a slab at shared address `at`; `slab_bytes`: distance of slabs, N-major only.
// Offsets of a multiple of 16 bytes are added as offset >> 4.
__device__ __forceinline__ uint64_t slab_descriptor(uint32_t at, uint32_t slab_bytes) {
  const uint32_t low = (at & 0x3FFFF) >> 4 | (slab_bytes >> 4) << 16;
  const uint32_t high = 1024 >> 4 | 1u << 30;  // 8 rows; 128-byte swizzle
  return static_cast<uint64_t>(high) << 32 | low;
}

// clang-format off
#define FI_ACC8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define FI_ACC32(i) FI_ACC8(i), FI_ACC8(i + 8), FI_ACC8(i + 16), FI_ACC8(i + 24)
#define FI_D32 FI_ACC32(0)
#define FI_D40 FI_ACC32(0), FI_ACC8(32)
#define FI_D48 FI_ACC32(0), FI_ACC8(32), FI_ACC8(40)
#define FI_D64 FI_ACC32(0), FI_ACC32(32)
#define FI_D96 FI_ACC32(0), FI_ACC32(32), FI_ACC32(64)
#define FI_D128 FI_ACC32(0), FI_ACC32(32), FI_ACC32(64), FI_ACC32(96)
#define FI_R0_31 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FI_R32_39 "%32, %33, %34, %35, %36, %37, %38, %39"
#define FI_R32_47 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FI_R32_63 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FI_R64_95 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FI_R96_127 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// c: number of accumulators; the operands behind them are numbered from there.
#define FI_WGMMA_SS(n, type, regs, acc, a_, b_, keep_)                                            \
  asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, %" keep_ ", 0;\n"                           \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" regs "}, "     \
               "%" a_ ", %" b_ ", keep, 1, 1, 0, 0;\n}"                                           \
               : acc : "l"(a), "l"(b), "r"(keep))
#define FI_WGMMA_RS(n, type, regs, acc, a0, a1, a2, a3, b_, keep_)                                \
  asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, %" keep_ ", 0;\n"                           \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" regs "}, "     \
               "{%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" b_ ", keep, 1, 1, 1;\n}"                 \
               : acc : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep))

// d (+)= A B^T, both K-major in shared memory; keep == 0: d is overwritten.
template <class T, int kN>
__device__ __forceinline__ void wgmma_ss(float (&d)[kN / 2], uint64_t a, uint64_t b, int keep) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  if constexpr (kN == 64) {
    if constexpr (kHalf)
      FI_WGMMA_SS("64", "f16", FI_R0_31, FI_D32, "32", "33", "34");
    else
      FI_WGMMA_SS("64", "bf16", FI_R0_31, FI_D32, "32", "33", "34");
  }
  else if constexpr (kN == 80) {
    if constexpr (kHalf)
      FI_WGMMA_SS("80", "f16", FI_R0_31 ", " FI_R32_39, FI_D40, "40", "41", "42");
    else
      FI_WGMMA_SS("80", "bf16", FI_R0_31 ", " FI_R32_39, FI_D40, "40", "41", "42");
  }
  else if constexpr (kN == 96) {
    if constexpr (kHalf)
      FI_WGMMA_SS("96", "f16", FI_R0_31 ", " FI_R32_47, FI_D48, "48", "49", "50");
    else
      FI_WGMMA_SS("96", "bf16", FI_R0_31 ", " FI_R32_47, FI_D48, "48", "49", "50");
  }
  else if constexpr (kN == 128) {
    if constexpr (kHalf)
      FI_WGMMA_SS("128", "f16", FI_R0_31 ", " FI_R32_63, FI_D64, "64", "65", "66");
    else
      FI_WGMMA_SS("128", "bf16", FI_R0_31 ", " FI_R32_63, FI_D64, "64", "65", "66");
  }
  else {
    static_assert(kN == 64, "no such width");
  }
}

// d (+)= A B, A in registers, B N-major in shared memory.
template <class T, int kN>
__device__ __forceinline__ void wgmma_rs(float (&d)[kN / 2], const uint32_t* a, uint64_t b, int keep) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  if constexpr (kN == 64) {
    if constexpr (kHalf)
      FI_WGMMA_RS("64", "f16", FI_R0_31, FI_D32, "32", "33", "34", "35", "36", "37");
    else
      FI_WGMMA_RS("64", "bf16", FI_R0_31, FI_D32, "32", "33", "34", "35", "36", "37");
  }
  else if constexpr (kN == 96) {
    if constexpr (kHalf)
      FI_WGMMA_RS("96", "f16", FI_R0_31 ", " FI_R32_47, FI_D48, "48", "49", "50", "51", "52", "53");
    else
      FI_WGMMA_RS("96", "bf16", FI_R0_31 ", " FI_R32_47, FI_D48, "48", "49", "50", "51", "52", "53");
  }
  else if constexpr (kN == 128) {
    if constexpr (kHalf)
      FI_WGMMA_RS("128", "f16", FI_R0_31 ", " FI_R32_63, FI_D64, "64", "65", "66", "67", "68", "69");
    else
      FI_WGMMA_RS("128", "bf16", FI_R0_31 ", " FI_R32_63, FI_D64, "64", "65", "66", "67", "68", "69");
  }
  else if constexpr (kN == 192) {
    if constexpr (kHalf)
      FI_WGMMA_RS("192", "f16", FI_R0_31 ", " FI_R32_63 ", " FI_R64_95, FI_D96, "96", "97", "98", "99", "100", "101");
    else
      FI_WGMMA_RS("192", "bf16", FI_R0_31 ", " FI_R32_63 ", " FI_R64_95, FI_D96, "96", "97", "98", "99", "100", "101");
  }
  else if constexpr (kN == 256) {
    if constexpr (kHalf)
      FI_WGMMA_RS("256", "f16", FI_R0_31 ", " FI_R32_63 ", " FI_R64_95 ", " FI_R96_127, FI_D128, "128", "129", "130", "131", "132", "133");
    else
      FI_WGMMA_RS("256", "bf16", FI_R0_31 ", " FI_R32_63 ", " FI_R64_95 ", " FI_R96_127, FI_D128, "128", "129", "130", "131", "132", "133");
  }
  else {
    static_assert(kN == 64, "no such width");
  }
}
#undef FI_WGMMA_SS
#undef FI_WGMMA_RS
#undef FI_ACC8
#undef FI_ACC32
#undef FI_R0_31
#undef FI_R32_39
#undef FI_R32_47
#undef FI_R32_63
#undef FI_R64_95
#undef FI_R96_127
#undef FI_D32
#undef FI_D40
#undef FI_D48
#undef FI_D64
#undef FI_D96
#undef FI_D128
// clang-format on

}  // namespace fastinfer::cuda::ptx
