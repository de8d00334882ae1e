// What the library has beside its operators: torch's threads for the kernels, and the choice of their copies.
#include "dispatch.h"

#include "parallel.h"

namespace megalm {

void parallel_for_raw(int64_t size, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, size, grain, body, context));
}

}  // namespace megalm

#define MEGALM_EXPORT extern "C" __attribute__((visibility("default")))

// The CPU's instruction set in use: 0 generic, 1 AVX2, 2 AVX-512, 3 with bfloat16. `limit` lowers it; -1 only asks.
MEGALM_EXPORT int megalm_instruction_set(int limit) {
  const int widest = static_cast<int>(megalm::widest_instruction_set());
  if (limit >= 0) megalm::instruction_set() = static_cast<megalm::InstructionSet>(limit < widest ? limit : widest);
  return static_cast<int>(megalm::instruction_set());
}

// Calls for CPU tensors go to the kernels that `find` names from now on; null: to the CPU's own again.
MEGALM_EXPORT void megalm_set_emulator(megalm::FindKernel find) { megalm::emulator() = find; }
