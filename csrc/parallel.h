// Threads: torch's own pool, reached through one function so that kernel sources need no torch header.
#pragma once
#include <cstdint>

namespace megalm {

// Calls body(start, stop, context) for parts of 0..size, at least `grain` long, on torch's threads.
void parallel_for_raw(int64_t size, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

template <class Body>
inline void parallel_for(int64_t size, int64_t grain, const Body& body) {
  if (size <= 0) return;
  parallel_for_raw(
      size, grain < 1 ? 1 : grain,
      [](int64_t start, int64_t stop, void* context) { (*static_cast<const Body*>(context))(start, stop); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Rows that are worth a thread of their own, for rows of `cols` elements.
inline int64_t grain_rows(int64_t cols) { return 1 + 16384 / (cols + 1); }

}  // namespace megalm
