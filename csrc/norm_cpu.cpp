#include "cpu.h"

#include "norm.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

// Adds the residual; returns the row that is normalized (what later passes read).
template <class T>
const T* add_residual(const NormForward& a, int64_t row, const T* x) {
  if (!a.residual) return x;
  const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride;
  T* sum_row = static_cast<T*>(a.sum) + row * a.cols;
  for_lanes(a.cols, [&](int64_t i, int n) { store(sum_row + i, load(x + i, n) + load(residual + i, n), n); });
  return sum_row;
}

template <class T>
void forward_row(const NormForward& a, int64_t row) {
  const T* x = add_residual(a, row, static_cast<const T*>(a.x) + row * a.x_stride);
  float mean = 0;
  if (a.center) {
    Vec total{};
    for_lanes(a.cols, [&](int64_t i, int n) { total += load(x + i, n); });
    mean = sum(total) / a.cols;
    a.mean[row] = mean;
  }
  Vec squares{};
  for_lanes(a.cols, [&](int64_t i, int n) {
    const Vec distance = load(x + i, n, mean) - mean;
    squares += distance * distance;
  });
  const float rstd = 1.0f / sqrtf(sum(squares) / a.cols + a.epsilon);
  a.rstd[row] = rstd;
  T* y = static_cast<T*>(a.y) + row * a.cols;
  for_lanes(a.cols, [&](int64_t i, int n) {
    const Vec bias = a.bias ? load(a.bias + i, n) : Vec{};
    store(y + i, norm_output(load(x + i, n), mean, rstd, load(a.weight + i, n), bias), n);
  });
}

template <class T>
void backward_row(const NormBackward& a, int64_t row, float* to_weight, float* to_bias) {
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  const T* grad = static_cast<const T*>(a.grad) + row * a.grad_stride;
  const float mean = a.center ? a.mean[row] : 0.0f, rstd = a.rstd[row];
  Vec sum_gw{}, sum_gwx{};
  for_lanes(a.cols, [&](int64_t i, int n) {
    const Vec g = load(grad + i, n), xhat = normalized(load(x + i, n), mean, rstd), gw = g * load(a.weight + i, n);
    sum_gw += gw;
    sum_gwx += gw * xhat;
    store(to_weight + i, load(to_weight + i, n) + g * xhat, n);
    if (to_bias) store(to_bias + i, load(to_bias + i, n) + g, n);
  });
  const float mean_gw = a.center ? sum(sum_gw) / a.cols : 0.0f, mean_gwx = sum(sum_gwx) / a.cols;
  T* out = static_cast<T*>(a.grad_x) + row * a.cols;
  const T* grad_sum = static_cast<const T*>(a.grad_sum);
  if (grad_sum) grad_sum += row * a.grad_sum_stride;
  for_lanes(a.cols, [&](int64_t i, int n) {
    Vec dx = norm_grad(load(grad + i, n), load(a.weight + i, n), load(x + i, n), mean, rstd, mean_gw, mean_gwx);
    if (grad_sum) dx += load(grad_sum + i, n);
    store(out + i, dx, n);
  });
}

void sum_chunks(const float* partial, float* out, int64_t chunks, int64_t cols) {
  for_lanes(cols, [&](int64_t i, int n) {
    Vec total{};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += load(partial + chunk * cols + i, n);
    store(out + i, total, n);
  });
}

}  // namespace

void norm_forward(const NormForward& a) {
  parallel_for(a.rows, grain_rows(a.cols), [&](int64_t start, int64_t stop) {
    for (int64_t row = start; row < stop; ++row) MEGALM_DISPATCH(a.dtype, T, forward_row<T>(a, row));
  });
}

// Rows go in a fixed number of chunks, each with its own sum of weight gradients: the result does not depend on threads.
void norm_backward(const NormBackward& a) {
  parallel_for(a.chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      float* to_weight = a.partial_weight + chunk * a.cols;
      float* to_bias = a.partial_bias ? a.partial_bias + chunk * a.cols : nullptr;
      memset(to_weight, 0, a.cols * sizeof(float));
      if (to_bias) memset(to_bias, 0, a.cols * sizeof(float));
      const int64_t stop = a.rows * (chunk + 1) / a.chunks;
      for (int64_t row = a.rows * chunk / a.chunks; row < stop; ++row) {
        MEGALM_DISPATCH(a.dtype, T, backward_row<T>(a, row, to_weight, to_bias));
      }
    }
  });
  sum_chunks(a.partial_weight, a.grad_weight, a.chunks, a.cols);
  if (a.grad_bias) sum_chunks(a.partial_bias, a.grad_bias, a.chunks, a.cols);
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
