// Chooses the copy of a kernel: the device of the tensors, and on CPUs the widest instruction set of this processor.
#pragma once
#include "kernels.h"
#include "tensors.h"
#if defined(MEGALM_WITH_CUDA)
#include <torch/csrc/stable/accelerator.h>
#endif

namespace megalm {

enum class InstructionSet { kGeneric, kAvx2, kAvx512, kAvx512Bf16 };

#define MEGALM_DECLARE(name, Arguments) void name(const Arguments& arguments);
#define MEGALM_ENTRY(name, Arguments) name,
#define MEGALM_COPY(isa)                                        \
  namespace isa {                                               \
  MEGALM_KERNELS(MEGALM_DECLARE)                                \
  constexpr KernelTable table = {MEGALM_KERNELS(MEGALM_ENTRY)}; \
  }
MEGALM_COPY(generic)
#if defined(__x86_64__)
MEGALM_COPY(avx2)
MEGALM_COPY(avx512)
MEGALM_COPY(avx512_bf16)
#endif
#undef MEGALM_COPY
#undef MEGALM_ENTRY
#undef MEGALM_DECLARE

// What this processor has.
inline InstructionSet widest_instruction_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16")) return InstructionSet::kAvx512Bf16;
  return avx2 && avx512 ? InstructionSet::kAvx512 : avx2 ? InstructionSet::kAvx2 : InstructionSet::kGeneric;
#else
  return InstructionSet::kGeneric;
#endif
}

inline const KernelTable* kernels_of(InstructionSet set) {
#if defined(__x86_64__)
  if (set == InstructionSet::kAvx512Bf16) return &avx512_bf16::table;
  if (set == InstructionSet::kAvx512) return &avx512::table;
  if (set == InstructionSet::kAvx2) return &avx2::table;
#endif
  (void)set;
  return &generic::table;
}

// The table in use.
inline const KernelTable*& cpu_kernels() {
  static const KernelTable* table = kernels_of(widest_instruction_set());
  return table;
}

#if defined(MEGALM_WITH_CUDA)
namespace device {
#define MEGALM_DECLARE(name, Arguments) void name(const Arguments& arguments, void* stream);
MEGALM_KERNELS(MEGALM_DECLARE)
#undef MEGALM_DECLARE
}  // namespace device

// The device of a tensor, made current, runs a kernel on torch's current stream.
#define MEGALM_RUN(name, Arguments)                                               \
  inline void name(const Tensor& on, const Arguments& arguments) {                \
    if (!on.is_cuda()) return cpu_kernels()->name(arguments);                     \
    namespace accelerator = torch::stable::accelerator;                           \
    const auto index = static_cast<int32_t>(on.get_device_index());               \
    const accelerator::DeviceGuard guard(index);                                  \
    device::name(arguments, accelerator::getCurrentStream(index).nativeHandle()); \
  }
#else
#define MEGALM_RUN(name, Arguments) \
  inline void name(const Tensor&, const Arguments& arguments) { cpu_kernels()->name(arguments); }
#endif

// Every kernel by name, where `on` lives.
namespace run {
MEGALM_KERNELS(MEGALM_RUN)
}
#undef MEGALM_RUN

}  // namespace megalm
