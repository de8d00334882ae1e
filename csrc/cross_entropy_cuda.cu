#include "cuda.h"

#include "cross_entropy.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

// A running maximum, and the sum of exp(x - it) (Milakov and Gimelshein 2018, arXiv:1805.02867). NaN stays in the sum.
struct Running {
  float largest = -INFINITY, total = 0.0f;

  template <int N>
  __device__ __forceinline__ void add(const Floats<N>& x) {
    float high = largest;
#pragma unroll
    for (int k = 0; k < N; ++k) high = fmaxf(x.at[k], high);
    const float base = high == -INFINITY ? 0.0f : high;
    total *= exp_(largest - base);
#pragma unroll
    for (int k = 0; k < N; ++k) total += exp_(x.at[k] - base);
    largest = high;
  }
};

// One team a row. The last columns, less than a pack, are read one by one.
template <class T, int N>
__global__ void __launch_bounds__(kMaxThreads) forward_kernel(CrossEntropyForward a, int threads) {
  constexpr int kAhead = 4;  // loads of a thread under way at once
  const Member member(threads);
  const int64_t row = member.row();
  const int cols = row < a.rows ? static_cast<int>(a.cols) : 0, whole = cols / N * N, step = member.size * N;
  const T* logits = row_of<T>(a.logits, row, a.stride);
  Running running;
  int i = member.rank * N;
  for (; i + (kAhead - 1) * step < whole; i += kAhead * step) {
    Raw<N, T> raw[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) raw[k] = load_raw<N>(logits + i + k * step);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) running.add(floats(raw[k]));
  }
  for (; i < whole; i += step) running.add(load<N>(logits + i));
  for (int rest = whole + member.rank; rest < cols; rest += member.size) running.add(load<1>(logits + rest));
  const float high = over_team(member, running.largest, Larger());
  const float base = high == -INFINITY ? 0.0f : high;
  const float total = over_team(member, running.total * exp_(running.largest - base), Add());
  if (member.rank != 0 || row >= a.rows) return;
  const int64_t column = a.labels[row] - a.start;
  a.max[row] = high;
  a.sum[row] = total;
  a.target[row] = column >= 0 && column < a.cols ? to_float(logits[column]) : (a.whole ? NAN : 0.0f);
}

template <class T, int N>
__global__ void __launch_bounds__(kMaxThreads) backward_kernel(CrossEntropyBackward a, int threads) {
  const Member member(threads);
  const int64_t row = member.row();
  if (row >= a.rows) return;
  const int cols = static_cast<int>(a.cols);
  const int64_t column = a.labels[row] - a.start;
  const T* logits = row_of<T>(a.logits, row, a.stride);
  T* grad = row_of<T>(a.grad, row, a.grad_stride);
  const float logsumexp = a.logsumexp[row], scale = a.scale[row];
  for_packs<N>(member, static_cast<int>(a.width), [&](int i) {
    Floats<N> x = load<N>(logits + i);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float value = cross_entropy_grad(x.at[k], logsumexp, scale) - (i + k == column ? scale : 0.0f);
      x.at[k] = i + k < cols && scale != 0.0f ? value : 0.0f;  // padding, and masked tokens
    }
    store(grad + i, x);
  });
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForward& a, Stream stream) {
  MEGALM_DISPATCH(a.dtype, T, {
    if (aligned<T>({a.logits}, {a.stride})) {
      launch_rows(forward_kernel<T, kPack<T>>, a.rows, a.cols, kPack<T>, stream, a);
    } else {
      launch_rows(forward_kernel<T, 1>, a.rows, a.cols, 1, stream, a);
    }
  });
}

void cross_entropy_backward(const CrossEntropyBackward& a, Stream stream) {
  MEGALM_DISPATCH(a.dtype, T, {
    if (aligned<T>({a.logits, a.grad}, {a.width, a.stride, a.grad_stride})) {
      launch_rows(backward_kernel<T, kPack<T>>, a.rows, a.width, kPack<T>, stream, a);
    } else {
      launch_rows(backward_kernel<T, 1>, a.rows, a.width, 1, stream, a);
    }
  });
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
