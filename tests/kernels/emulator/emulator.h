// Stands for the CUDA runtime: runs the blocks of a kernel on the CPU, one after the other, each thread as a coroutine.
//
// A thread runs until it meets __syncthreads or a shuffle and goes on when all threads of its block, or of its warp, are
// there. Where some never come (a divergent barrier), the launch throws. Threads run in ascending and descending order by
// turns, so that a missing barrier shows as a wrong number; even blocks run before odd ones, so that a write beyond a
// block's own share shows in a neighbour. Wide loads and stores must be aligned, as on the device.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__ [[maybe_unused]] static
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define __syncthreads() ::emulator::wait(::emulator::State::kAtBlockBarrier)
#define __shfl_xor_sync(mask, value, lanes) ::emulator::shuffle_xor(mask, value, lanes)

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated kernel: %s\n", what);
  std::abort();
}

// A vector type whose every access checks its alignment.
template <class Lane, int lanes>
struct Vector {
  Lane lane[lanes];
  Vector() = default;
  Vector(const Vector& other) {
    check(&other);
    std::memcpy(lane, other.lane, sizeof lane);
  }
  Vector& operator=(const Vector& other) {
    check(this);
    check(&other);
    std::memcpy(lane, other.lane, sizeof lane);
    return *this;
  }
  static void check(const void* p) {
    if (reinterpret_cast<uintptr_t>(p) % sizeof(Vector) != 0) fail("a wide access is not aligned");
  }
};

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;

// A thread starts by its context and goes on by a jump: switching contexts would cost a system call each time.
struct Thread {
  ucontext_t context;
  jmp_buf place;
  bool started = false;
  State state = State::kDone;
  unsigned shuffles = 0;  // its parity chooses the slots: a warp's next shuffle may not overwrite this one's
  alignas(8) char slots[2][8];
};

struct Block {
  std::vector<Thread> threads;
  char* stacks = nullptr;
  jmp_buf scheduler;
  unsigned current = 0;
  const std::function<void()>* body = nullptr;
};
inline Block block;
inline std::mutex one_launch;

inline void wait(State state) {
  Thread& self = block.threads[block.current];
  self.state = state;
  if (!_setjmp(self.place)) _longjmp(block.scheduler, 1);
}

// Runs a thread until it waits.
__attribute__((noinline)) inline void go_on(Thread& thread) {
  if (_setjmp(block.scheduler)) return;
  if (thread.started) _longjmp(thread.place, 1);
  thread.started = true;
  setcontext(&thread.context);
}

template <class F>
F shuffle_xor(uint32_t mask, F value, int lanes) {
  static_assert(sizeof(F) <= 8);
  if (mask != 0xffffffffu) fail("only whole warps shuffle here");
  const unsigned self = block.current, slot = block.threads[self].shuffles++ % 2;
  std::memcpy(block.threads[self].slots[slot], &value, sizeof value);
  wait(State::kAtWarpBarrier);
  std::memcpy(&value, block.threads[self ^ static_cast<unsigned>(lanes)].slots[slot], sizeof value);
  return value;
}

inline void enter() {
  (*block.body)();
  wait(State::kDone);
}

// Lets threads first .. last go on if all of them wait in `state`; whether it did.
inline bool release(size_t first, size_t last, State state) {
  for (size_t i = first; i < last; ++i) {
    if (block.threads[i].state != state) return false;
  }
  for (size_t i = first; i < last; ++i) block.threads[i].state = State::kReady;
  return true;
}

inline void run_block() {
  const size_t count = block.threads.size();
  bool descending = false, all_done = false;
  while (!all_done) {
    bool moved = false;
    for (size_t turn = 0; turn < count; ++turn) {
      const size_t i = descending ? count - 1 - turn : turn;
      if (block.threads[i].state != State::kReady) continue;
      block.current = static_cast<unsigned>(i);
      threadIdx = {block.current, 0, 0};
      go_on(block.threads[i]);
      moved = true;
    }
    descending = !descending;
    for (size_t warp = 0; warp < count; warp += kWarp) moved |= release(warp, warp + kWarp, State::kAtWarpBarrier);
    moved |= release(0, count, State::kAtBlockBarrier);
    all_done = true;
    for (const Thread& thread : block.threads) all_done &= thread.state == State::kDone;
    if (!moved && !all_done) throw std::runtime_error("emulated kernel: a barrier that not all threads reach");
  }
}

inline void start(Thread& thread, char* stack) {
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = stack;
  thread.context.uc_stack.ss_size = kStackBytes;
  thread.context.uc_link = nullptr;
  thread.state = State::kReady;
  thread.started = false;
  makecontext(&thread.context, enter, 0);
}

inline void launch(unsigned blocks, unsigned threads, const std::function<void()>& body) {
  const std::lock_guard<std::mutex> guard(one_launch);
  if (threads == 0 || threads > 1024 || threads % kWarp) throw std::runtime_error("emulated kernel: threads of a block");
  if (!block.stacks) {
    block.stacks = static_cast<char*>(
        mmap(nullptr, 1024 * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  block.body = &body;
  block.threads.assign(threads, Thread());
  gridDim = {blocks, 1, 1};
  blockDim = {threads, 1, 1};
  const unsigned even = (blocks + 1) / 2;
  for (unsigned turn = 0; turn < blocks; ++turn) {
    blockIdx = {turn < even ? 2 * turn : 2 * (turn - even) + 1, 0, 0};
    for (unsigned i = 0; i < threads; ++i) start(block.threads[i], block.stacks + i * kStackBytes);
    run_block();
  }
}

// Launchers by the name of their kernel.
using Launch = void (*)(const void* arguments);
inline std::map<std::string, Launch>& launchers() {
  static std::map<std::string, Launch> found;
  return found;
}
struct Launcher {
  Launcher(const char* name, Launch launch) { launchers()[name] = launch; }
};

}  // namespace emulator

using uint2 = emulator::Vector<uint32_t, 2>;
using uint4 = emulator::Vector<uint32_t, 4>;
