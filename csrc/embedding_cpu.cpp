#include "cpu.h"

#include "embedding.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

template <class T>
void table_rows(const EmbeddingBackward& a, int64_t start, int64_t stop) {
  int64_t place = first_place(a.ids, a.tokens, start);
  const T* grad = static_cast<const T*>(a.grad);
  for (int64_t row = start; row < stop; ++row) {
    T* out = static_cast<T*>(a.out) + row * a.cols;
    int64_t end = place;
    while (end < a.tokens && a.ids[end] == row) ++end;
    if (end == place) {
      memset(out, 0, a.cols * sizeof(T));
      continue;
    }
    for_lanes(a.cols, [&](int64_t i, int n) {
      Vec total{};
      for (int64_t at = place; at < end; ++at) total += load(grad + a.order[at] * a.stride + i, n);
      store(out + i, total, n);
    });
    place = end;
  }
}

}  // namespace

void embedding_backward(const EmbeddingBackward& a) {
  parallel_for(a.rows, grain_rows(a.cols), [&](int64_t start, int64_t stop) {
    MEGALM_DISPATCH(a.dtype, T, table_rows<T>(a, start, stop));
  });
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
