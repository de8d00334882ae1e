// The CUDA launchers as a table of CPU kernels.
#include "cuda.h"

namespace megalm {
namespace {
#define MEGALM_ENTRY(name, Arguments) [](const Arguments& arguments) { name(arguments, nullptr); },
const KernelTable table = {MEGALM_KERNELS(MEGALM_ENTRY)};
#undef MEGALM_ENTRY
}  // namespace
}  // namespace megalm

extern "C" __attribute__((visibility("default"))) const megalm::KernelTable* emulated_kernels() { return &megalm::table; }
