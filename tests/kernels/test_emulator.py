"""The emulator of CUDA: it runs a right kernel, and what would be wrong on a device is wrong here too."""

import subprocess

import pytest
from kernels.cached import cached
from kernels.emulated import FLAGS, INCLUDE

from megalm.kernels.building.places import find_cxx

# Kernels write to out[0 .. 64]; the first is right: out[t] is the next thread, around, and out[64] the sum of all.
PROGRAM = r"""
#include "cuda.h"
#include <cstdio>
using namespace megalm;

__global__ void neighbours(float* out, bool barrier) {
  __shared__ float shared[64];
  const Member member(64);
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (barrier) __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 1) % 64];
  const float sum = over_team(member, static_cast<float>(threadIdx.x), Add());
  if (threadIdx.x == 0) out[64] = sum;
}
__global__ void divergent(float* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 1.0f;
}
__global__ void shuffle_of_some(float* out) {
  if (threadIdx.x % 2) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, out[0], 1);
}
__global__ void misaligned(float* out) {
  if (threadIdx.x == 0) copy_words<4, float>(out, out + 1);
}
__global__ void team(float* out, int) { out[threadIdx.x] = 1.0f; }

int main(int, char** arguments) {
  alignas(16) float memory[128] = {};
  float* const out = memory;
  const Grid one{1, 64};
  try {
    switch (arguments[1][0]) {
      case 'r': launch(neighbours, one, nullptr, out, true); break;
      case 'n': launch(neighbours, one, nullptr, out, false); break;
      case 'd': launch(divergent, one, nullptr, out); break;
      case 's': launch(shuffle_of_some, one, nullptr, out); break;
      case 'm': launch(misaligned, one, nullptr, out); break;
      case 'l': launch_rows(team, 1, int64_t{1} << 31, 1, nullptr, out); break;
      case 'h': launch_rows(team, int64_t{1} << 31, 1, 1, nullptr, out); break;
      default: launch(divergent, Grid{1, 65}, nullptr, out); break;
    }
  } catch (const std::exception& error) {
    std::printf("%s", error.what());
    return 1;
  }
  for (int i = 0; i < 65; ++i) std::printf("%g ", static_cast<double>(out[i]));
}
"""
RIGHT = [*((t + 1) % 64 for t in range(64)), 64 * 63 / 2]


@pytest.fixture(scope="module")
def program():
    """The compiled program: its argument chooses the kernel."""
    cxx = find_cxx()
    if cxx is None:
        pytest.skip("there is no C++ compiler")

    def make(folder):
        (folder / "program.cpp").write_text(PROGRAM)
        command = [cxx, *FLAGS, *INCLUDE, str(folder / "program.cpp"), "-o", str(folder / "program")]
        answer = subprocess.run(command, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
        return folder / "program"

    return cached("emulator", [cxx, *FLAGS, PROGRAM], make)


def run(program, kernel: str) -> subprocess.CompletedProcess:
    """One launch in a process of its own, which a fault may end."""
    return subprocess.run([program, kernel], capture_output=True, text=True, timeout=60)


def numbers(program, kernel: str) -> list[float]:
    """out[0 .. 64] of a launch that went through."""
    answer = run(program, kernel)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return [float(word) for word in answer.stdout.split()]


def test_a_right_kernel_gives_the_right_numbers(program):
    assert numbers(program, "right") == RIGHT


def test_a_missing_barrier_gives_wrong_ones(program):
    assert numbers(program, "no barrier") != RIGHT


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("divergent barrier", "a barrier that not all threads reach"),
        ("shuffle of some", "a barrier that not all threads reach"),
        ("misaligned", "a wide access is not aligned"),
        ("long rows", "2^31 rows or columns in one call"),
        ("high columns", "2^31 rows or columns in one call"),
        ("threads", "threads of a block"),
    ],
)
def test_a_fault_is_named(program, kernel, message):
    answer = run(program, kernel)
    assert answer.returncode != 0
    assert message in answer.stdout + answer.stderr
