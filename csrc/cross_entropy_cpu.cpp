#include "cpu.h"

#include "cross_entropy.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

// Columns whose maximum is found before their exponentials: they come from memory once, then from the first cache.
constexpr int64_t kLossBlock = 4096;

template <class T>
void forward_row(const CrossEntropyForward& a, int64_t row) {
  const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
  float largest = -INFINITY, total = 0;
  for (int64_t start = 0; start < a.cols; start += kLossBlock) {
    const T* block = logits + start;
    const int64_t size = a.cols - start < kLossBlock ? a.cols - start : kLossBlock;
    Vec block_max = splat(-INFINITY), block_sum{};
    for_lanes(size, [&](int64_t i, int n) {
      const Vec x = load(block + i, n, -INFINITY);
      block_max = select((x > block_max) | (x != x), x, block_max);
    });
    float previous = largest;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (block_max[lane] > largest || block_max[lane] != block_max[lane]) largest = block_max[lane];
    }
    if (largest == -INFINITY) continue;
    for_lanes(size, [&](int64_t i, int n) { block_sum += exp_(load(block + i, n, -INFINITY) - largest); });
    total = (previous == -INFINITY ? 0.0f : total * expf(previous - largest)) + sum(block_sum);
  }
  const int64_t column = a.labels[row] - a.start;
  a.max[row] = largest;
  a.sum[row] = total;
  a.target[row] = column >= 0 && column < a.cols ? to_float(logits[column]) : 0.0f;
}

template <class T>
void backward_row(const CrossEntropyBackward& a, int64_t row) {
  const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
  T* grad = static_cast<T*>(a.grad) + row * a.grad_stride;
  const float logsumexp = a.logsumexp[row], scale = a.scale[row];
  const int64_t column = a.labels[row] - a.start;
  const bool here = column >= 0 && column < a.cols;
  const float label = here ? cross_entropy_grad(to_float(logits[column]), logsumexp, scale) - scale : 0.0f;
  if (scale == 0.0f) {  // a masked token
    memset(grad, 0, a.width * sizeof(T));
    return;
  }
  for_lanes(a.cols, [&](int64_t i, int n) {
    store(grad + i, cross_entropy_grad(load(logits + i, n), logsumexp, scale), n);
  });
  memset(grad + a.cols, 0, (a.width - a.cols) * sizeof(T));
  if (here) grad[column] = from_float<T>(label);
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForward& a) {
  parallel_for(a.rows, grain_rows(a.cols), [&](int64_t start, int64_t stop) {
    for (int64_t row = start; row < stop; ++row) MEGALM_DISPATCH(a.dtype, T, forward_row<T>(a, row));
  });
}

void cross_entropy_backward(const CrossEntropyBackward& a) {
  parallel_for(a.rows, grain_rows(a.cols), [&](int64_t start, int64_t stop) {
    for (int64_t row = start; row < stop; ++row) MEGALM_DISPATCH(a.dtype, T, backward_row<T>(a, row));
  });
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
