#include "cuda.h"

#include "embedding.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

// Where the tokens of each row of the table start among the sorted ones; one thread a row.
__global__ void __launch_bounds__(kMaxThreads) starts_kernel(EmbeddingBackward a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row <= a.rows) a.starts[row] = first_place(a.ids, a.tokens, row);
}

// One team a row of the table: no atomics, and the sum's order is that of the tokens.
template <class T, int N>
__global__ void __launch_bounds__(kMaxThreads) backward_kernel(EmbeddingBackward a, int threads) {
  const Member member(threads);
  const int64_t row = member.row();
  if (row >= a.rows) return;
  const int64_t* const order = a.order + a.starts[row];
  const int count = static_cast<int>(a.starts[row + 1] - a.starts[row]);
  const T* grad = static_cast<const T*>(a.grad);
  T* out = row_of<T>(a.out, row, a.cols);
  for_packs<N>(member, static_cast<int>(a.cols), [&](int i) {
    Floats<N> total{};
#pragma unroll 4
    for (int at = 0; at < count; ++at) {
      const Floats<N> g = load<N>(grad + order[at] * a.stride + i);
#pragma unroll
      for (int k = 0; k < N; ++k) total.at[k] += g.at[k];
    }
    store(out + i, total);
  });
}

}  // namespace

void embedding_backward(const EmbeddingBackward& a, Stream stream) {
  launch(starts_kernel, Grid{(a.rows + kMaxThreads) / kMaxThreads, kMaxThreads}, stream, a);
  MEGALM_DISPATCH(a.dtype, T, {
    if (aligned<T>({a.grad, a.out}, {a.cols, a.stride})) {
      launch_rows(backward_kernel<T, kPack<T>>, a.rows, a.cols, 4 * kPack<T>, stream, a);
    } else {
      launch_rows(backward_kernel<T, 1>, a.rows, a.cols, 1, stream, a);
    }
  });
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
