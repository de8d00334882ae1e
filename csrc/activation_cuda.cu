#include "cuda.h"

#include "activation.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

template <Activation kind, class T>
__global__ void __launch_bounds__(kMaxThreads) gated_kernel(Gated a, int threads) {
  constexpr int N = kPack<T>;
  const Member member(threads);
  const int64_t row = member.row();
  if (row >= a.rows) return;
  const T *gate = row_of<T>(a.gate, row, a.gate_stride), *up = row_of<T>(a.up, row, a.up_stride);
  const T* grad = row_of<T>(a.grad, row, a.grad_stride);
  T *y = row_of<T>(a.y, row, a.cols), *grad_gate = row_of<T>(a.grad_gate, row, a.cols);
  T* grad_up = row_of<T>(a.grad_up, row, a.cols);
  for_packs<N>(member, a.cols, [&](int64_t i, int64_t n) {
    Floats<N> x = read<N>(gate + i, n), other = read<N>(up + i, n);
    const Floats<N> g = grad ? read<N>(grad + i, n) : Floats<N>{};
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const auto f = activation<kind>(x.at[k]);
      x.at[k] = grad ? g.at[k] * other.at[k] * f.slope : f.value * other.at[k];
      other.at[k] = g.at[k] * f.value;
    }
    write<N>((grad ? grad_gate : y) + i, n, x);
    if (grad) write<N>(grad_up + i, n, other);
  });
}

// A thread owns a pack of columns in all rows of a chunk, so that the bias's gradient needs no other thread.
template <Activation kind, class T>
__global__ void __launch_bounds__(kMaxThreads) bias_kernel(BiasActivation a, int threads) {
  constexpr int N = kPack<T>;
  const Member member(threads);
  const int64_t chunk = member.row(), stop = a.rows * (chunk + 1) / a.chunks;
  if (chunk >= a.chunks) return;
  for_packs<N>(member, a.cols, [&](int64_t i, int64_t n) {
    const Floats<N> bias = a.bias ? read<N>(a.bias + i, n) : Floats<N>{};
    Floats<N> total{};
    for (int64_t row = a.rows * chunk / a.chunks; row < stop; ++row) {
      Floats<N> x = read<N>(row_of<T>(a.x, row, a.x_stride) + i, n);
      const Floats<N> g = a.grad ? read<N>(row_of<T>(a.grad, row, a.grad_stride) + i, n) : Floats<N>{};
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const auto f = activation<kind>(x.at[k] + bias.at[k]);
        x.at[k] = a.grad ? g.at[k] * f.slope : f.value;
        total.at[k] += x.at[k];
      }
      write<N>(row_of<T>(a.y, row, a.cols) + i, n, x);
    }
    if (a.partial_bias) write<N>(a.partial_bias + chunk * a.cols + i, n, total);
  });
}

}  // namespace

void gated_activation(const Gated& a, Stream stream) {
  MEGALM_DISPATCH(a.dtype, T,
                  MEGALM_DISPATCH_ACTIVATION(a.kind, kind, launch_rows(gated_kernel<kind, T>, a.rows, a.cols, kPack<T>,
                                                                       stream, a)));
}

void bias_activation(const BiasActivation& a, Stream stream) {
  MEGALM_DISPATCH(a.dtype, T,
                  MEGALM_DISPATCH_ACTIVATION(a.kind, kind, launch_rows(bias_kernel<kind, T>, a.chunks, a.cols, kPack<T>,
                                                                       stream, a)));
  if (a.grad_bias) sum_chunks(a.partial_bias, a.grad_bias, a.chunks, a.cols, stream);
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
