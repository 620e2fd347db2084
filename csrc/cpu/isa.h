// Instruction-set levels of the CPU kernels and the choice among them at run time.
//
// Every csrc/cpu/<stem>*.cpp (this file's users) is one portable source, compiled once per level
// with -DFI_ISA=<level>; its functions live in fastinfer::cpu::<level>. Those objects may contain
// no inline or template function with external linkage (std:: containers and algorithms included):
// the linker keeps one copy of such a function and might keep the AVX-512 one. Hence raw loops and
// anonymous namespaces there; tests/test_build.py looks at the symbols.
//
//   FI_DECLARE_KERNEL(rms_norm, const RmsNormParams& p, int64_t begin, int64_t end)   in
//   csrc/cpu/norm.h FI_PICK(rms_norm)(p, begin, end) in csrc/ops/norm.cpp
#pragma once

namespace fastinfer::cpu {

enum class Isa { generic, avx2, avx512, vnni };

// The level in use: what the processor and the operating system support, lowered (never raised) by
// FASTINFER_CPU_ISA.
Isa isa();
const char* isa_name();

}  // namespace fastinfer::cpu

#ifdef FI_X86
#define FI_DECLARE_KERNEL(name, ...)  \
  namespace fastinfer::cpu::generic { \
  void name(__VA_ARGS__);             \
  }                                   \
  namespace fastinfer::cpu::avx2 {    \
  void name(__VA_ARGS__);             \
  }                                   \
  namespace fastinfer::cpu::avx512 {  \
  void name(__VA_ARGS__);             \
  }
#define FI_PICK(name)                                                                         \
  (::fastinfer::cpu::isa() >= ::fastinfer::cpu::Isa::avx512 ? &::fastinfer::cpu::avx512::name \
   : ::fastinfer::cpu::isa() == ::fastinfer::cpu::Isa::avx2 ? &::fastinfer::cpu::avx2::name   \
                                                            : &::fastinfer::cpu::generic::name)
// Kernels with a VNNI form (files csrc/cpu/linear*.cpp are compiled at that level too).
#define FI_DECLARE_KERNEL_VNNI(name, ...) \
  FI_DECLARE_KERNEL(name, __VA_ARGS__)    \
  namespace fastinfer::cpu::vnni {        \
  void name(__VA_ARGS__);                 \
  }
#define FI_PICK_VNNI(name)                                                                \
  (::fastinfer::cpu::isa() == ::fastinfer::cpu::Isa::vnni ? &::fastinfer::cpu::vnni::name \
                                                          : FI_PICK(name))
#else
#define FI_DECLARE_KERNEL(name, ...)  \
  namespace fastinfer::cpu::generic { \
  void name(__VA_ARGS__);             \
  }
#define FI_PICK(name) (&::fastinfer::cpu::generic::name)
#define FI_DECLARE_KERNEL_VNNI(name, ...) FI_DECLARE_KERNEL(name, __VA_ARGS__)
#define FI_PICK_VNNI(name) FI_PICK(name)
#endif
