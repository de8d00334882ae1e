#include "cuda.h"

#include "dropout.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

// Multiplies elements first .. first + N by 0 or `keep`: element e takes number e % 4 of Philox counter e / 4.
// Where N is a multiple of 4, `first` is one too.
template <int N>
__device__ __forceinline__ void drop(Floats<N>& x, int64_t seed, int64_t first, uint32_t bound, float keep) {
  uint32_t numbers[4];
#pragma unroll
  for (int k = 0; k < N; k += 4) {
    const int64_t counter = (first + k) >> 2;
    philox(seed, static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), numbers);
    if constexpr (N == 1) {
      const int at = static_cast<int>(first & 3);
      const uint32_t number = at < 2 ? (at == 0 ? numbers[0] : numbers[1]) : (at == 2 ? numbers[2] : numbers[3]);
      x.at[0] *= number < bound ? 0.0f : keep;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) x.at[k + j] *= numbers[j] < bound ? 0.0f : keep;
    }
  }
}

constexpr int kAhead = 2;  // packs of a thread whose loads are under way at once

template <class T, int N>
__global__ void __launch_bounds__(kMaxThreads) add_kernel(DropoutAdd a, int threads) {
  const Member member(threads);
  const int64_t row = member.row(), seed = *a.seed;
  if (row >= a.rows) return;
  const T* x = row_of<T>(a.x, row, a.x_stride);
  const T* residual = row_of<T>(a.residual, row, a.residual_stride);
  T* y = row_of<T>(a.y, row, a.cols);
  const int64_t start = mask_start(a, row);
  const uint32_t bound = drop_below(a.probability);
  const float keep = 1.0f / (1.0f - a.probability);
  const int cols = static_cast<int>(a.cols), step = member.size * N;
  for (int first = member.rank * N; first < cols; first += kAhead * step) {
    Raw<N, T> raw[kAhead], raw_other[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int i = first + k * step;
      if (i < cols) raw[k] = load_raw<N>(x + i);
      if (i < cols && residual) raw_other[k] = load_raw<N>(residual + i);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int i = first + k * step;
      if (i >= cols) break;
      Floats<N> value = floats(raw[k]);
      if (a.probability > 0) drop(value, seed, start + i, bound, keep);
      if (residual) {
        const Floats<N> other = floats(raw_other[k]);
#pragma unroll
        for (int j = 0; j < N; ++j) value.at[j] += other.at[j];
      }
      store(y + i, value);
    }
  }
}

}  // namespace

void dropout_add(const DropoutAdd& a, Stream stream) {
  MEGALM_DISPATCH(a.dtype, T, {
    if (aligned<T>({a.x, a.residual, a.y}, {a.cols, a.x_stride, a.residual_stride})) {
      launch_rows(add_kernel<T, kPack<T>>, a.rows, a.cols, 4 * kPack<T>, stream, a);
    } else {
      launch_rows(add_kernel<T, 1>, a.rows, a.cols, 1, stream, a);
    }
  });
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
