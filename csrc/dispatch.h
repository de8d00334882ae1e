// What a <op>_bindings.cpp includes first: MEGALM_KERNEL makes run::name(tensor, arguments), which calls the copy of a
// kernel for the tensor's device, and on CPUs for the widest instruction set of this processor.
#pragma once
#define MEGALM_ISA any

#define MEGALM_COPY(isa, name, Arguments) \
  namespace isa {                         \
  void name(const Arguments& arguments);  \
  }
#if defined(__x86_64__)
#define MEGALM_COPIES(name, Arguments)      \
  MEGALM_COPY(generic, name, Arguments)     \
  MEGALM_COPY(avx2, name, Arguments)        \
  MEGALM_COPY(avx512, name, Arguments)      \
  MEGALM_COPY(avx512_bf16, name, Arguments) \
  constexpr CpuKernel<Arguments> name##_copies[] = {generic::name, avx2::name, avx512::name, avx512_bf16::name};
#else
#define MEGALM_COPIES(name, Arguments)  \
  MEGALM_COPY(generic, name, Arguments) \
  constexpr CpuKernel<Arguments> name##_copies[] = {generic::name};
#endif

#if defined(MEGALM_WITH_CUDA)
#define MEGALM_KERNEL(name, Arguments)                                    \
  MEGALM_COPIES(name, Arguments)                                          \
  namespace device {                                                      \
  void name(const Arguments& arguments, void* stream);                    \
  }                                                                       \
  namespace run {                                                         \
  inline void name(const Tensor& on, const Arguments& arguments) {        \
    if (!on.is_cuda()) return run_on_cpu(#name, name##_copies, arguments); \
    run_on_device(on, device::name, arguments);                           \
  }                                                                       \
  }
#else
#define MEGALM_KERNEL(name, Arguments)                             \
  MEGALM_COPIES(name, Arguments)                                   \
  namespace run {                                                  \
  inline void name(const Tensor&, const Arguments& arguments) {    \
    run_on_cpu(#name, name##_copies, arguments);                   \
  }                                                                \
  }
#endif

#include "tensors.h"
#if defined(MEGALM_WITH_CUDA)
#include <torch/csrc/stable/accelerator.h>
#endif

namespace megalm {

// `m.def` gives an operator's signature in MEGALM_SCHEMA; `m.impl` its function in MEGALM_IMPLEMENT, which is for CPU
// tensors and, where the library has kernels for them, for CUDA's.
#define MEGALM_SCHEMA(m) STABLE_TORCH_LIBRARY_FRAGMENT(megalm, m)
#if defined(MEGALM_WITH_CUDA)
#define MEGALM_IMPLEMENT(op, m)                                                      \
  static void implement_##op(torch::stable::detail::StableLibrary& m);               \
  STABLE_TORCH_LIBRARY_IMPL(megalm, CPU, library) { implement_##op(library); }       \
  STABLE_TORCH_LIBRARY_IMPL(megalm, CUDA, library) { implement_##op(library); }      \
  static void implement_##op(torch::stable::detail::StableLibrary& m)
#else
#define MEGALM_IMPLEMENT(op, m) STABLE_TORCH_LIBRARY_IMPL(megalm, CPU, m)
#endif

enum class InstructionSet { kGeneric, kAvx2, kAvx512, kAvx512Bf16 };

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

// The copies in use.
inline InstructionSet& instruction_set() {
  static InstructionSet chosen = widest_instruction_set();
  return chosen;
}

// Finds a kernel by name: how the tests run the CUDA sources on CPU tensors. Null: the CPU's own kernels run.
using FindKernel = void (*(*)(const char* name))(const void* arguments);
inline FindKernel& emulator() {
  static FindKernel find = nullptr;
  return find;
}

template <class Arguments>
using CpuKernel = void (*)(const Arguments& arguments);

template <class Arguments>
void run_on_cpu(const char* name, const CpuKernel<Arguments>* copies, const Arguments& arguments) {
  if (emulator()) return emulator()(name)(&arguments);
  copies[static_cast<int>(instruction_set())](arguments);
}

#if defined(MEGALM_WITH_CUDA)
// The device of a tensor, made current, runs a kernel on torch's current stream.
template <class Arguments>
void run_on_device(const Tensor& on, void (*kernel)(const Arguments&, void*), const Arguments& arguments) {
  namespace accelerator = torch::stable::accelerator;
  const auto index = static_cast<int32_t>(on.get_device_index());
  const accelerator::DeviceGuard guard(index);
  kernel(arguments, accelerator::getCurrentStream(index).nativeHandle());
}
#endif

}  // namespace megalm
