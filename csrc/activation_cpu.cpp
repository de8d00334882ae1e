#include "cpu.h"

#include "activation.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

template <class T>
void swiglu_rows(const SwiGLU& a, int64_t start, int64_t stop) {
  for (int64_t row = start; row < stop; ++row) {
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
    if (!a.grad) {
      T* y = static_cast<T*>(a.y) + row * a.cols;
      for_lanes(a.cols, [&](int64_t i, int n) { store(y + i, silu(load(gate + i, n)).value * load(up + i, n), n); });
      continue;
    }
    const T* grad = static_cast<const T*>(a.grad) + row * a.grad_stride;
    T* grad_gate = static_cast<T*>(a.grad_gate) + row * a.cols;
    T* grad_up = static_cast<T*>(a.grad_up) + row * a.cols;
    for_lanes(a.cols, [&](int64_t i, int n) {
      const auto f = silu(load(gate + i, n));
      const Vec g = load(grad + i, n);
      store(grad_gate + i, g * load(up + i, n) * f.slope, n);
      store(grad_up + i, g * f.value, n);
    });
  }
}

template <Activation kind, class T>
void activation_rows(const Elementwise& a, int64_t start, int64_t stop) {
  for (int64_t row = start; row < stop; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    const T* grad = static_cast<const T*>(a.grad);
    if (grad) grad += row * a.grad_stride;
    T* y = static_cast<T*>(a.y) + row * a.cols;
    for_lanes(a.cols, [&](int64_t i, int n) {
      const auto f = value_and_slope<kind>(load(x + i, n));
      store(y + i, grad ? load(grad + i, n) * f.slope : f.value, n);
    });
  }
}

}  // namespace

void swiglu(const SwiGLU& a) {
  parallel_for(a.rows, grain_rows(a.cols), [&](int64_t start, int64_t stop) {
    MEGALM_DISPATCH(a.dtype, T, swiglu_rows<T>(a, start, stop));
  });
}

void activation(const Elementwise& a) {
  parallel_for(a.rows, grain_rows(a.cols), [&](int64_t start, int64_t stop) {
    MEGALM_DISPATCH(a.dtype, T, MEGALM_DISPATCH_ACTIVATION(a.kind, kind, (activation_rows<kind, T>(a, start, stop))));
  });
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
