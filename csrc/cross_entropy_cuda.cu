#include "cuda.h"

#include "cross_entropy.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

// One team a row: each thread keeps a running maximum and sum (Milakov and Gimelshein 2018, arXiv:1805.02867).
template <class T>
__global__ void __launch_bounds__(kMaxThreads) forward_kernel(CrossEntropyForward a, int threads) {
  constexpr int N = kPack<T>;
  const Member member(threads);
  const int64_t row = member.row(), cols = row < a.rows ? a.cols : 0;
  const T* logits = row_of<T>(a.logits, row, a.stride);
  float largest = -INFINITY, total = 0.0f;
  for_packs<N>(member, cols, [&](int64_t i, int64_t n) {
    const Floats<N> x = read<N>(logits + i, n, -INFINITY);
    float high = largest;
#pragma unroll
    for (int k = 0; k < N; ++k) high = larger(x.at[k], high);
    if (high == -INFINITY) return;
    total = total == 0.0f ? 0.0f : total * expf(largest - high);
#pragma unroll
    for (int k = 0; k < N; ++k) total += expf(x.at[k] - high);
    largest = high;
  });
  const float high = over_team(member, largest, Larger());
  total = over_team(member, total == 0.0f ? 0.0f : total * expf(largest - high), Add());
  if (member.rank != 0 || row >= a.rows) return;
  const int64_t column = a.labels[row] - a.start;
  a.max[row] = high;
  a.sum[row] = total;
  a.target[row] = column >= 0 && column < a.cols ? to_float(logits[column]) : (a.whole ? NAN : 0.0f);
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) backward_kernel(CrossEntropyBackward a, int threads) {
  constexpr int N = kPack<T>;
  const Member member(threads);
  const int64_t row = member.row();
  if (row >= a.rows) return;
  const int64_t column = a.labels[row] - a.start;
  const T* logits = row_of<T>(a.logits, row, a.stride);
  T* grad = row_of<T>(a.grad, row, a.grad_stride);
  const float logsumexp = a.logsumexp[row], scale = a.scale[row];
  const float factor = cross_entropy_factor(scale, logsumexp, a.z_loss);
  for_packs<N>(member, a.width, [&](int64_t i, int64_t n) {
    Floats<N> x = read<N>(logits + i, n);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float value = cross_entropy_grad(x.at[k], logsumexp, factor) - (i + k == column ? scale : 0.0f);
      x.at[k] = i + k < a.cols && scale != 0.0f ? value : 0.0f;  // padding, and masked tokens
    }
    write<N>(grad + i, n, x);
  });
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForward& a, Stream stream) {
  MEGALM_DISPATCH(a.dtype, T, launch_rows(forward_kernel<T>, a.rows, a.cols, kPack<T>, stream, a));
}

void cross_entropy_backward(const CrossEntropyBackward& a, Stream stream) {
  MEGALM_DISPATCH(a.dtype, T, launch_rows(backward_kernel<T>, a.rows, a.width, kPack<T>, stream, a));
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
