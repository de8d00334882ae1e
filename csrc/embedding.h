// Gradient of an embedding table: each row is the float32 sum, in the order of the tokens, of its tokens' gradients.
#pragma once
#include "common.h"

namespace megalm {

struct EmbeddingBackward {
  const void* grad;  // (tokens, cols) by row stride
  const int64_t *ids, *order;  // (tokens): ids sorted ascending, and where each stood (stable)
  void* out;  // (rows, cols), contiguous, every row is written
  int64_t* starts;  // (rows + 1) work space
  int64_t tokens, rows, cols, stride;
  Dtype dtype;
};

MEGALM_KERNEL(embedding_backward, EmbeddingBackward)

inline namespace MEGALM_ISA {

// First place in the sorted ids whose id is at least `id`.
MEGALM_HD int64_t first_place(const int64_t* ids, int64_t size, int64_t id) {
  int64_t low = 0;
  while (low < size) {
    const int64_t middle = (low + size) / 2;
    if (ids[middle] < id) low = middle + 1;
    else size = middle;
  }
  return low;
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
