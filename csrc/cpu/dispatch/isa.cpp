// Detects the instruction-set level once; FASTINFER_CPU_ISA (generic, avx2, avx512, vnni) can lower
// it at any time.
#include "../isa.h"

#include <cstdlib>
#include <cstring>

namespace fastinfer::cpu {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "vnni"};

Isa detect() {
#ifdef FI_X86
  // __builtin_cpu_supports also checks that the operating system saves the wide registers (xgetbv).
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512vnni")) return Isa::vnni;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::generic;
}

}  // namespace

Isa isa() {
  static const Isa best = detect();
  const char* wanted = std::getenv("FASTINFER_CPU_ISA");
  if (!wanted) return best;
  for (int level = 0; level < static_cast<int>(best); ++level)
    if (std::strcmp(wanted, kNames[level]) == 0) return static_cast<Isa>(level);
  return best;
}

const char* isa_name() { return kNames[static_cast<int>(isa())]; }

}  // namespace fastinfer::cpu
