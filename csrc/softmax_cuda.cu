#include "cuda.h"

#include "softmax.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

// 16-byte packs of a row that a thread holds in registers: in a forward without masks, and besides. Wider rows are read
// again for every pass.
constexpr int kPlainPacks = 4, kPacks = 2;

// A row of scores and what of it a query sees; one team has it.
template <class T>
struct Query {
  int64_t t, h, b;
  const T* scores;
  T* y;
  int keys, seen;  // of the keys, by causality; both 0 beyond the last row

  __device__ __forceinline__ Query(const Softmax& a, const Member& member) {
    const unsigned row = member.row();
    const auto queries = static_cast<unsigned>(a.queries), heads = static_cast<unsigned>(a.heads);
    t = row % queries, h = row / queries % heads, b = row / queries / heads;
    scores = row_of<T>(a.scores, row, a.keys);
    y = row_of<T>(a.y, row, a.keys);
    const bool live = b < a.batch;
    keys = live ? static_cast<int>(a.keys) : 0;
    seen = live ? static_cast<int>(keys_seen(a, t)) : 0;
  }

  // Scaled scores of the pack that starts at key i, -inf where one is hidden.
  template <bool kMasks, int N>
  __device__ __forceinline__ Floats<N> visible(const Softmax& a, int i, Floats<N> x) const {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const bool sight = i + k < seen && (!kMasks || sees(a, b, h, t, i + k));
      x.at[k] = sight ? x.at[k] * a.scale : -INFINITY;
    }
    return x;
  }
};

// Of a query that sees nothing: it mixes nothing.
__device__ __forceinline__ float inverse_or_zero(float largest, float total) {
  return largest == -INFINITY ? 0.0f : 1.0f / total;
}

template <int N>
__device__ __forceinline__ void largest_of(const Floats<N>& x, float& largest) {
#pragma unroll
  for (int k = 0; k < N; ++k) largest = larger(x.at[k], largest);
}

// Where nothing is visible, the largest is -inf and every exponential 0.
template <int N>
__device__ __forceinline__ void exponentials(Floats<N>& x, float largest, float& total) {
  const float base = largest == -INFINITY ? 0.0f : largest;
#pragma unroll
  for (int k = 0; k < N; ++k) total += x.at[k] = exp_(x.at[k] - base);
}

template <class T, bool kMasks>
__global__ void __launch_bounds__(kMaxThreads) kept_forward_kernel(Softmax a, int threads) {
  constexpr int N = kPack<T>, kHeld = kMasks ? kPacks : kPlainPacks;
  const Member member(threads);
  const Query<T> query(a, member);
  Raw<N, T> raw[kHeld];
  for_kept<N, kHeld>(member, query.seen, [&](int k, int i) { raw[k] = load_raw<N>(query.scores + i); });
  Floats<N> x[kHeld] = {};
  float largest = -INFINITY, total[1] = {};
  for_kept<N, kHeld>(member, query.seen, [&](int k, int i) {
    x[k] = query.template visible<kMasks>(a, i, floats(raw[k]));
    largest_of(x[k], largest);
  });
  largest = over_team(member, largest, Larger());
  for_kept<N, kHeld>(member, query.seen, [&](int k, int) { exponentials(x[k], largest, total[0]); });
  add_over_team(member, total);
  const float inverse = inverse_or_zero(largest, total[0]);
  for_kept<N, kHeld>(member, query.keys, [&](int k, int i) {
#pragma unroll
    for (int j = 0; j < N; ++j) x[k].at[j] *= inverse;
    store(query.y + i, x[k]);
  });
}

// The same for rows of any width.
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1) forward_kernel(Softmax a, int threads) {
  const Member member(threads);
  const Query<T> query(a, member);
  const auto visible = [&](int i) { return query.template visible<true>(a, i, load<1>(query.scores + i)); };
  float largest = -INFINITY, total[1] = {};
  for_packs<1>(member, query.seen, [&](int i) { largest_of(visible(i), largest); });
  largest = over_team(member, largest, Larger());
  for_packs<1>(member, query.seen, [&](int i) {
    Floats<1> x = visible(i);
    exponentials(x, largest, total[0]);
  });
  add_over_team(member, total);
  const float inverse = inverse_or_zero(largest, total[0]);
  for_packs<1>(member, query.keys, [&](int i) {
    Floats<1> x = visible(i);
    float ignored = 0.0f;
    exponentials(x, largest, ignored);
    x.at[0] *= inverse;
    store(query.y + i, x);
  });
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) kept_backward_kernel(SoftmaxBackward a, int threads) {
  constexpr int N = kPack<T>;
  const Member member(threads);
  const int64_t row = member.row();
  const int cols = row < a.rows ? static_cast<int>(a.cols) : 0;
  const T *grad = row_of<T>(a.grad, row, a.cols), *y = row_of<T>(a.y, row, a.cols);
  T* out = row_of<T>(a.grad_scores, row, a.cols);
  Raw<N, T> raw_grad[kPacks], raw_y[kPacks];
  for_kept<N, kPacks>(member, cols, [&](int k, int i) {
    raw_grad[k] = load_raw<N>(grad + i);
    raw_y[k] = load_raw<N>(y + i);
  });
  float total[1] = {};
  for_kept<N, kPacks>(member, cols, [&](int k, int) {
    const Floats<N> g = floats(raw_grad[k]), p = floats(raw_y[k]);
#pragma unroll
    for (int j = 0; j < N; ++j) total[0] += g.at[j] * p.at[j];
  });
  add_over_team(member, total);
  for_kept<N, kPacks>(member, cols, [&](int k, int i) {
    Floats<N> g = floats(raw_grad[k]);
    const Floats<N> p = floats(raw_y[k]);
#pragma unroll
    for (int j = 0; j < N; ++j) g.at[j] = softmax_grad(g.at[j], p.at[j], total[0], a.scale);
    store(out + i, g);
  });
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) backward_kernel(SoftmaxBackward a, int threads) {
  const Member member(threads);
  const int64_t row = member.row();
  const int cols = row < a.rows ? static_cast<int>(a.cols) : 0;
  const T *grad = row_of<T>(a.grad, row, a.cols), *y = row_of<T>(a.y, row, a.cols);
  T* out = row_of<T>(a.grad_scores, row, a.cols);
  float total[1] = {};
  for_packs<1>(member, cols, [&](int i) { total[0] += to_float(grad[i]) * to_float(y[i]); });
  add_over_team(member, total);
  for_packs<1>(member, cols, [&](int i) {
    out[i] = from_float<T>(softmax_grad(to_float(grad[i]), to_float(y[i]), total[0], a.scale));
  });
}

}  // namespace

void softmax_forward(const Softmax& a, Stream stream) {
  const int64_t rows = a.batch * a.heads * a.queries;
  const bool masks = a.visible || a.query_documents;
  const int packs = masks ? kPacks : kPlainPacks;
  MEGALM_DISPATCH(a.dtype, T, {
    if (fits<T>(a.keys, packs) && aligned<T>({a.scores, a.y}, {a.keys})) {
      const auto kernel = masks ? kept_forward_kernel<T, true> : kept_forward_kernel<T, false>;
      launch_rows(kernel, rows, a.keys, packs * kPack<T>, stream, a);
    } else {
      launch_rows(forward_kernel<T>, rows, a.keys, 1, stream, a);
    }
  });
}

void softmax_backward(const SoftmaxBackward& a, Stream stream) {
  MEGALM_DISPATCH(a.dtype, T, {
    if (fits<T>(a.cols, kPacks) && aligned<T>({a.grad, a.y, a.grad_scores}, {a.cols})) {
      launch_rows(kept_backward_kernel<T>, a.rows, a.cols, kPacks * kPack<T>, stream, a);
    } else {
      launch_rows(backward_kernel<T>, a.rows, a.cols, 1, stream, a);
    }
  });
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
