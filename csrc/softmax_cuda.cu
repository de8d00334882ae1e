#include "cuda.h"

#include "softmax.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

template <class T>
__global__ void __launch_bounds__(kMaxThreads) forward_kernel(Softmax a, int threads) {
  constexpr int N = kPack<T>;
  const Member member(threads);
  const unsigned row = member.row(), queries = static_cast<unsigned>(a.queries), heads = static_cast<unsigned>(a.heads);
  const int64_t t = row % queries, h = row / queries % heads, b = row / queries / heads;
  const bool live = b < a.batch;
  const T* scores = row_of<T>(a.scores, row, a.keys);
  T* y = row_of<T>(a.y, row, a.keys);
  const int64_t seen = live ? keys_seen(a, t) : 0;
  const auto masked = [&](int64_t i) {
    Floats<N> x = read<N>(scores + i, a.keys - i);
#pragma unroll
    for (int k = 0; k < N; ++k) x.at[k] = i + k < seen && sees(a, b, h, t, i + k) ? x.at[k] * a.scale : -INFINITY;
    return x;
  };
  float largest = -INFINITY, total = 0.0f;
  for_packs<N>(member, seen, [&](int64_t i, int64_t) {
    const Floats<N> x = masked(i);
#pragma unroll
    for (int k = 0; k < N; ++k) largest = larger(x.at[k], largest);
  });
  largest = over_team(member, largest, Larger());
  for_packs<N>(member, seen, [&](int64_t i, int64_t) {
    const Floats<N> x = masked(i);
#pragma unroll
    for (int k = 0; k < N; ++k) total += x.at[k] == -INFINITY ? 0.0f : expf(x.at[k] - largest);
  });
  total = over_team(member, total, Add());
  const float inverse = largest == -INFINITY ? 0.0f : 1.0f / total;  // a query that sees nothing mixes nothing
  for_packs<N>(member, live ? a.keys : 0, [&](int64_t i, int64_t n) {
    Floats<N> x = masked(i);
#pragma unroll
    for (int k = 0; k < N; ++k) x.at[k] = x.at[k] == -INFINITY ? 0.0f : expf(x.at[k] - largest) * inverse;
    write<N>(y + i, n, x);
  });
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) backward_kernel(SoftmaxBackward a, int threads) {
  constexpr int N = kPack<T>;
  const Member member(threads);
  const int64_t row = member.row(), cols = row < a.rows ? a.cols : 0;
  const T *grad = row_of<T>(a.grad, row, a.cols), *y = row_of<T>(a.y, row, a.cols);
  T* out = row_of<T>(a.grad_scores, row, a.cols);
  float total = 0.0f;
  for_packs<N>(member, cols, [&](int64_t i, int64_t n) {
    const Floats<N> g = read<N>(grad + i, n), p = read<N>(y + i, n);
#pragma unroll
    for (int k = 0; k < N; ++k) total += g.at[k] * p.at[k];
  });
  total = over_team(member, total, Add());
  for_packs<N>(member, cols, [&](int64_t i, int64_t n) {
    Floats<N> g = read<N>(grad + i, n);
    const Floats<N> p = read<N>(y + i, n);
#pragma unroll
    for (int k = 0; k < N; ++k) g.at[k] = softmax_grad(g.at[k], p.at[k], total, a.scale);
    write<N>(out + i, n, g);
  });
}

}  // namespace

void softmax_forward(const Softmax& a, Stream stream) {
  const int64_t rows = a.batch * a.heads * a.queries;
  MEGALM_DISPATCH(a.dtype, T, launch_rows(forward_kernel<T>, rows, a.keys, kPack<T>, stream, a));
}

void softmax_backward(const SoftmaxBackward& a, Stream stream) {
  MEGALM_DISPATCH(a.dtype, T, launch_rows(backward_kernel<T>, a.rows, a.cols, kPack<T>, stream, a));
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
