// The launchers of the CUDA sources, found by name.
#include "cuda.h"

extern "C" __attribute__((visibility("default"))) emulator::Launch emulated_kernel(const char* name) {
  return emulator::launchers().at(name);
}
