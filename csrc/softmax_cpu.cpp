#include "cpu.h"

#include "softmax.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

// Scores of n keys from `key` on, hidden ones as -inf.
template <class T>
Vec masked(const Softmax& a, const T* scores, int64_t b, int64_t h, int64_t t, int64_t key, int n) {
  Vec x = load(scores + key, n, -INFINITY) * a.scale;
  if (n < kLanes) {
    for (int lane = n; lane < kLanes; ++lane) x[lane] = -INFINITY;
  }
  if (a.visible || a.query_documents) {
    for (int lane = 0; lane < n; ++lane) {
      if (!sees(a, b, h, t, key + lane)) x[lane] = -INFINITY;
    }
  }
  return x;
}

template <class T>
void forward_row(const Softmax& a, int64_t row) {
  const int64_t t = row % a.queries, h = row / a.queries % a.heads, b = row / a.queries / a.heads;
  const T* scores = static_cast<const T*>(a.scores) + row * a.keys;
  T* y = static_cast<T*>(a.y) + row * a.keys;
  const int64_t seen = keys_seen(a, t);
  Vec largest_lanes = splat(-INFINITY), total{};
  for_lanes(seen, [&](int64_t i, int n) { largest_lanes = max_(largest_lanes, masked(a, scores, b, h, t, i, n)); });
  const float largest = max_lane(largest_lanes);
  memset(y + seen, 0, (a.keys - seen) * sizeof(T));
  if (largest == -INFINITY) {  // a query that sees nothing mixes nothing
    memset(y, 0, seen * sizeof(T));
    return;
  }
  for_lanes(seen, [&](int64_t i, int n) { total += exp_(masked(a, scores, b, h, t, i, n) - largest); });
  const float inverse = 1.0f / sum(total);
  for_lanes(seen, [&](int64_t i, int n) {
    store(y + i, exp_(masked(a, scores, b, h, t, i, n) - largest) * inverse, n);
  });
}

template <class T>
void backward_row(const SoftmaxBackward& a, int64_t row) {
  const T* grad = static_cast<const T*>(a.grad) + row * a.cols;
  const T* y = static_cast<const T*>(a.y) + row * a.cols;
  T* out = static_cast<T*>(a.grad_scores) + row * a.cols;
  Vec products{};
  for_lanes(a.cols, [&](int64_t i, int n) { products += load(grad + i, n) * load(y + i, n); });
  const float total = sum(products);
  for_lanes(a.cols, [&](int64_t i, int n) {
    store(out + i, softmax_grad(load(grad + i, n), load(y + i, n), total, a.scale), n);
  });
}

}  // namespace

void softmax_forward(const Softmax& a) {
  parallel_for(a.batch * a.heads * a.queries, grain_rows(a.keys), [&](int64_t start, int64_t stop) {
    for (int64_t row = start; row < stop; ++row) MEGALM_DISPATCH(a.dtype, T, forward_row<T>(a, row));
  });
}

void softmax_backward(const SoftmaxBackward& a) {
  parallel_for(a.rows, grain_rows(a.cols), [&](int64_t start, int64_t stop) {
    for (int64_t row = start; row < stop; ++row) MEGALM_DISPATCH(a.dtype, T, backward_row<T>(a, row));
  });
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
