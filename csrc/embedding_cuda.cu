#include "cuda.h"

#include "embedding.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

// One block a row of the table: no atomics, and the sum's order is that of the tokens.
template <class T>
__global__ void __launch_bounds__(kMaxThreads) backward_kernel(EmbeddingBackward a) {
  constexpr int N = kPack<T>;
  const int64_t row = blockIdx.x, place = first_place(a.ids, a.tokens, row);
  const T* grad = static_cast<const T*>(a.grad);
  T* out = row_of<T>(a.out, row, a.cols);
  for_packs<N>(a.cols, [&](int64_t i, int64_t n) {
    Floats<N> total{};
    for (int64_t at = place; at < a.tokens && a.ids[at] == row; ++at) {
      const Floats<N> g = read<N>(grad + a.order[at] * a.stride + i, n);
#pragma unroll
      for (int k = 0; k < N; ++k) total.at[k] += g.at[k];
    }
    write<N>(out + i, n, total);
  });
}

}  // namespace

void embedding_backward(const EmbeddingBackward& a, Stream stream) {
  MEGALM_DISPATCH(a.dtype, T, launch(backward_kernel<T>, a.rows, threads_for(a.cols, kPack<T>), stream, a));
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
