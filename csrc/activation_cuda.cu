#include "cuda.h"

#include "activation.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

template <Activation kind, class T, int N, bool backward>
__global__ void __launch_bounds__(kMaxThreads) gated_kernel(Gated a, int threads) {
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
      const auto f = activation<kind>(x.at[k]);
      x.at[k] = backward ? g.at[k] * other.at[k] * f.slope : f.value * other.at[k];
      other.at[k] = g.at[k] * f.value;
    }
    store((backward ? grad_gate : y) + i, x);
    if (backward) store(grad_up + i, other);
  });
}

// A thread owns a pack of columns in all rows of a chunk, so that the bias's gradient needs no other thread. The loads
// of a row are under way while the one before is worked on.
template <Activation kind, class T, int N, bool backward>
__global__ void __launch_bounds__(kMaxThreads) bias_kernel(BiasActivation a, int threads) {
  const Member member(threads);
  const int64_t chunk = member.row();
  if (chunk >= a.chunks) return;
  const int64_t start = a.rows * chunk / a.chunks, stop = a.rows * (chunk + 1) / a.chunks;
  T* const y = static_cast<T*>(a.y);
  for_packs<N>(member, static_cast<int>(a.cols), [&](int i) {
    const Floats<N> bias = a.bias ? load<N>(a.bias + i) : Floats<N>{};
    const T* x = row_of<T>(a.x, start, a.x_stride) + i;
    const T* grad = backward ? row_of<T>(a.grad, start, a.grad_stride) + i : x;
    Floats<N> total{};
    Raw<N, T> next = load_raw<N>(x), next_grad = load_raw<N>(grad);
    for (int64_t row = start; row < stop; ++row) {
      Floats<N> value = floats(next);
      const Floats<N> g = floats(next_grad);
      if (row + 1 < stop) {
        x += a.x_stride;
        next = load_raw<N>(x);
        if (backward) {
          grad += a.grad_stride;
          next_grad = load_raw<N>(grad);
        }
      }
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const auto f = activation<kind>(value.at[k] + bias.at[k]);
        value.at[k] = backward ? g.at[k] * f.slope : f.value;
        if (backward) total.at[k] += value.at[k];
      }
      store(y + row * a.cols + i, value);
    }
    if (backward && a.partial_bias) store(a.partial_bias + chunk * a.cols + i, total);
  });
}

template <Activation kind, class T, int N>
void launch_gated(const Gated& a, Stream stream) {
  launch_rows(a.grad ? gated_kernel<kind, T, N, true> : gated_kernel<kind, T, N, false>, a.rows, a.cols, N, stream, a);
}

// As many chunks as can be worked on at once, so that all end together; their number replaces that of the call.
template <Activation kind, class T, int N>
void launch_bias(BiasActivation& a, Stream stream) {
  const auto kernel = a.grad ? bias_kernel<kind, T, N, true> : bias_kernel<kind, T, N, false>;
  const Teams teams(a.cols, N);
  a.chunks = std::min(a.chunks, resident_blocks(kernel, teams.threads * teams.count) * teams.count);
  launch_rows(kernel, a.chunks, a.cols, N, stream, a);
}

}  // namespace

void gated_activation(const Gated& a, Stream stream) {
  MEGALM_DISPATCH(a.dtype, T, {
    const bool wide = aligned<T>({a.gate, a.up, a.grad, a.y, a.grad_gate, a.grad_up},
                                 {a.cols, a.gate_stride, a.up_stride, a.grad_stride});
    MEGALM_DISPATCH_ACTIVATION(a.kind, kind, {
      if (wide) launch_gated<kind, T, kPack<T>>(a, stream);
      else launch_gated<kind, T, 1>(a, stream);
    });
  });
}

void bias_activation(const BiasActivation& arguments, Stream stream) {
  BiasActivation a = arguments;
  MEGALM_DISPATCH(a.dtype, T, {
    const bool wide = aligned<T>({a.x, a.grad, a.bias, a.y, a.partial_bias}, {a.cols, a.x_stride, a.grad_stride});
    MEGALM_DISPATCH_ACTIVATION(a.kind, kind, {
      if (wide) launch_bias<kind, T, kPack<T>>(a, stream);
      else launch_bias<kind, T, 1>(a, stream);
    });
  });
  if (a.grad_bias) sum_chunks(a.partial_bias, a.grad_bias, a.chunks, a.cols, stream);
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
