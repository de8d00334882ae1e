#include "cuda.h"

#include "embedding.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

// One team a row of the table: no atomics, and the sum's order is that of the tokens.
template <class T>
__global__ void __launch_bounds__(kMaxThreads) backward_kernel(EmbeddingBackward a, int threads) {
  constexpr int N = kPack<T>;
  const Member member(threads);
  const int64_t row = member.row();
  if (row >= a.rows) return;
  const int64_t place = first_place(a.ids, a.tokens, row);
  const bool seen = place < a.tokens && a.ids[place] == row;
  // a count that is known before lets the loads of several tokens be under way at once
  const int64_t count = seen ? first_place(a.ids + place, a.tokens - place, row + 1) : 0;
  const T* grad = static_cast<const T*>(a.grad);
  T* out = row_of<T>(a.out, row, a.cols);
  for_packs<N>(member, a.cols, [&](int64_t i, int64_t n) {
    Floats<N> total{};
#pragma unroll 4
    for (int64_t at = 0; at < count; ++at) {
      const Floats<N> g = read<N>(grad + a.order[place + at] * a.stride + i, n);
#pragma unroll
      for (int k = 0; k < N; ++k) total.at[k] += g.at[k];
    }
    write<N>(out + i, n, total);
  });
}

}  // namespace

void embedding_backward(const EmbeddingBackward& a, Stream stream) {
  MEGALM_DISPATCH(a.dtype, T, launch_rows(backward_kernel<T>, a.rows, a.cols, kPack<T>, stream, a));
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
