#include "cpu.h"

#include "activation.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

template <Activation kind, class T>
void gated_rows(const Gated& a, int64_t start, int64_t stop) {
  for (int64_t row = start; row < stop; ++row) {
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
    if (!a.grad) {
      T* y = static_cast<T*>(a.y) + row * a.cols;
      for_lanes(a.cols, [&](int64_t i, int n) {
        store(y + i, activation<kind>(load(gate + i, n)).value * load(up + i, n), n);
      });
      continue;
    }
    const T* grad = static_cast<const T*>(a.grad) + row * a.grad_stride;
    T* grad_gate = static_cast<T*>(a.grad_gate) + row * a.cols;
    T* grad_up = static_cast<T*>(a.grad_up) + row * a.cols;
    for_lanes(a.cols, [&](int64_t i, int n) {
      const auto f = activation<kind>(load(gate + i, n));
      const Vec g = load(grad + i, n);
      store(grad_gate + i, g * load(up + i, n) * f.slope, n);
      store(grad_up + i, g * f.value, n);
    });
  }
}

template <Activation kind, class T>
void bias_rows(const BiasActivation& a, int64_t start, int64_t stop, float* to_bias) {
  for (int64_t row = start; row < stop; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    const T* grad = static_cast<const T*>(a.grad);
    if (grad) grad += row * a.grad_stride;
    T* y = static_cast<T*>(a.y) + row * a.cols;
    for_lanes(a.cols, [&](int64_t i, int n) {
      const auto f = activation<kind>(a.bias ? load(x + i, n) + load(a.bias + i, n) : load(x + i, n));
      const Vec result = grad ? load(grad + i, n) * f.slope : f.value;
      store(y + i, result, n);
      if (to_bias) store(to_bias + i, load(to_bias + i, n) + result, n);
    });
  }
}

}  // namespace

void gated_activation(const Gated& a) {
  parallel_for(a.rows, grain_rows(a.cols), [&](int64_t start, int64_t stop) {
    MEGALM_DISPATCH(a.dtype, T, MEGALM_DISPATCH_ACTIVATION(a.kind, kind, (gated_rows<kind, T>(a, start, stop))));
  });
}

void bias_activation(const BiasActivation& a) {
  parallel_for(a.chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      float* to_bias = a.partial_bias ? a.partial_bias + chunk * a.cols : nullptr;
      if (to_bias) memset(to_bias, 0, a.cols * sizeof(float));
      const int64_t start = a.rows * chunk / a.chunks, stop = a.rows * (chunk + 1) / a.chunks;
      MEGALM_DISPATCH(a.dtype, T,
                      MEGALM_DISPATCH_ACTIVATION(a.kind, kind, (bias_rows<kind, T>(a, start, stop, to_bias))));
    }
  });
  if (!a.grad_bias) return;
  for_lanes(a.cols, [&](int64_t i, int n) {
    Vec total{};
    for (int64_t chunk = 0; chunk < a.chunks; ++chunk) total += load(a.partial_bias + chunk * a.cols + i, n);
    store(a.grad_bias + i, total, n);
  });
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
