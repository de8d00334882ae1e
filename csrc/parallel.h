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

// Calls body(t, start, stop) for blocks of the elements of each of `count` tensors (with a member `size`), all in one
// parallel loop: a model has many small tensors, and every loop ends with the threads waiting for each other.
// (Nothing of std here: the linker would keep the copy of one instruction set for all.)
template <class Item, class Body>
inline void parallel_for_blocks(const Item* tensors, int64_t count, int64_t block, const Body& body) {
  int64_t total = 0;
  for (int64_t t = 0; t < count; ++t) total += (tensors[t].size + block - 1) / block;
  parallel_for(total, 1, [&](int64_t begin, int64_t end) {
    int64_t first = 0;  // number of the first block of tensor t
    for (int64_t t = 0; t < count && first < end; ++t) {
      const int64_t size = tensors[t].size, next = first + (size + block - 1) / block;
      for (int64_t at = begin > first ? begin : first; at < next && at < end; ++at) {
        const int64_t start = (at - first) * block;
        body(t, start, size - start < block ? size : start + block);
      }
      first = next;
    }
  });
}

// Rows that are worth a thread of their own, for rows of `cols` elements.
inline int64_t grain_rows(int64_t cols) { return 1 + 16384 / (cols + 1); }

}  // namespace megalm
