// Chooses the copy of a kernel: the widest instruction set that this processor has.
#pragma once
#ifndef MEGALM_ISA
#define MEGALM_ISA any
#endif
#include "kernels.h"

namespace megalm {

#define MEGALM_DECLARE(name, Arguments) void name(const Arguments& arguments);
namespace generic {
MEGALM_KERNELS(MEGALM_DECLARE)
}
#if defined(__x86_64__)
namespace avx2 {
MEGALM_KERNELS(MEGALM_DECLARE)
}
namespace avx512 {
MEGALM_KERNELS(MEGALM_DECLARE)
}
#endif
#undef MEGALM_DECLARE

enum class InstructionSet { kGeneric, kAvx2, kAvx512 };

// What this processor has; a test may lower `instruction_set()` to run the other copies.
inline InstructionSet widest_instruction_set() {
#if defined(__x86_64__)
  static const InstructionSet best = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx2 && avx512 ? InstructionSet::kAvx512 : avx2 ? InstructionSet::kAvx2 : InstructionSet::kGeneric;
  }();
  return best;
#else
  return InstructionSet::kGeneric;
#endif
}

inline InstructionSet& instruction_set() {
  static InstructionSet chosen = widest_instruction_set();
  return chosen;
}

#if defined(__x86_64__)
#define MEGALM_ON_CPU(name, Arguments)                                          \
  inline void name(const Arguments& arguments) {                                \
    switch (instruction_set()) {                                                \
      case InstructionSet::kAvx512: return avx512::name(arguments);             \
      case InstructionSet::kAvx2: return avx2::name(arguments);                 \
      case InstructionSet::kGeneric: return generic::name(arguments);           \
    }                                                                           \
  }
#else
#define MEGALM_ON_CPU(name, Arguments) \
  inline void name(const Arguments& arguments) { generic::name(arguments); }
#endif
namespace cpu {
MEGALM_KERNELS(MEGALM_ON_CPU)
}
#undef MEGALM_ON_CPU

}  // namespace megalm
