#include "cuda.h"

#include "activation.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

template <class T, int N, bool backward>
__global__ void __launch_bounds__(kMaxThreads) swiglu_kernel(SwiGLU a, int threads) {
  const Member member(threads);
  const int64_t row = member.row();
  if (row >= a.rows) return;
  const T *gate = row_of<T>(a.gate, row, a.gate_stride), *up = row_of<T>(a.up, row, a.up_stride);
  const T* grad = row_of<T>(a.grad, row, a.grad_stride);
  T *y = row_of<T>(a.y, row, a.cols), *grad_gate = row_of<T>(a.grad_gate, row, a.cols);
  T* grad_up = row_of<T>(a.grad_up, row, a.cols);
  for_packs<N>(member, static_cast<int>(a.cols), [&](int i) {
    const Raw<N, T> raw_gate = load_raw<N>(gate + i), raw_up = load_raw<N>(up + i);
    const Raw<N, T> raw_grad = backward ? load_raw<N>(grad + i) : raw_up;
    Floats<N> x = floats(raw_gate), other = floats(raw_up);
    const Floats<N> g = floats(raw_grad);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const auto f = silu(x.at[k]);
      x.at[k] = backward ? g.at[k] * other.at[k] * f.slope : f.value * other.at[k];
      other.at[k] = g.at[k] * f.value;
    }
    store((backward ? grad_gate : y) + i, x);
    if (backward) store(grad_up + i, other);
  });
}

template <Activation kind, class T, int N, bool backward>
__global__ void __launch_bounds__(kMaxThreads) activation_kernel(Elementwise a, int threads) {
  const Member member(threads);
  const int64_t row = member.row();
  if (row >= a.rows) return;
  const T* x = row_of<T>(a.x, row, a.x_stride);
  const T* grad = backward ? row_of<T>(a.grad, row, a.grad_stride) : x;
  T* y = row_of<T>(a.y, row, a.cols);
  for_packs<N>(member, static_cast<int>(a.cols), [&](int i) {
    const Raw<N, T> raw = load_raw<N>(x + i), raw_grad = load_raw<N>(grad + i);
    Floats<N> value = floats(raw);
    const Floats<N> g = floats(raw_grad);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const auto f = value_and_slope<kind>(value.at[k]);
      value.at[k] = backward ? g.at[k] * f.slope : f.value;
    }
    store(y + i, value);
  });
}

template <class T, int N>
void launch_swiglu(const SwiGLU& a, Stream stream) {
  launch_rows(a.grad ? swiglu_kernel<T, N, true> : swiglu_kernel<T, N, false>, a.rows, a.cols, N, stream, a);
}

template <Activation kind, class T, int N>
void launch_activation(const Elementwise& a, Stream stream) {
  const auto kernel = a.grad ? activation_kernel<kind, T, N, true> : activation_kernel<kind, T, N, false>;
  launch_rows(kernel, a.rows, a.cols, N, stream, a);
}

}  // namespace

void swiglu(const SwiGLU& a, Stream stream) {
  MEGALM_DISPATCH(a.dtype, T, {
    const bool wide = aligned<T>({a.gate, a.up, a.grad, a.y, a.grad_gate, a.grad_up},
                                 {a.cols, a.gate_stride, a.up_stride, a.grad_stride});
    if (wide) launch_swiglu<T, kPack<T>>(a, stream);
    else launch_swiglu<T, 1>(a, stream);
  });
}

void activation(const Elementwise& a, Stream stream) {
  MEGALM_DISPATCH(a.dtype, T, {
    const bool wide = aligned<T>({a.x, a.grad, a.y}, {a.cols, a.x_stride, a.grad_stride});
    MEGALM_DISPATCH_ACTIVATION(a.kind, kind, {
      if (wide) launch_activation<kind, T, kPack<T>>(a, stream);
      else launch_activation<kind, T, 1>(a, stream);
    });
  });
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
