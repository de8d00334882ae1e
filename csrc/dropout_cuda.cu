#include "cuda.h"

#include "dropout.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

// Multiplies elements first .. first + N by 0 or `keep`: element e takes number e % 4 of Philox counter e / 4.
template <int N>
__device__ __forceinline__ void drop(Floats<N>& x, int64_t seed, int64_t first, uint32_t bound, float keep) {
  uint32_t numbers[4] = {};
  int64_t drawn = -1;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const int64_t element = first + k;
    if (element >> 2 != drawn) {
      drawn = element >> 2;
      philox(seed, static_cast<uint32_t>(drawn), static_cast<uint32_t>(drawn >> 32), numbers);
    }
    const int at = static_cast<int>(element & 3);
    const uint32_t number = at < 2 ? (at == 0 ? numbers[0] : numbers[1]) : (at == 2 ? numbers[2] : numbers[3]);
    x.at[k] *= number < bound ? 0.0f : keep;
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) add_kernel(BiasDropoutAdd a, int threads) {
  constexpr int N = kPack<T>;
  const Member member(threads);
  const int64_t row = member.row(), seed = *a.seed;
  if (row >= a.rows) return;
  const T* x = row_of<T>(a.x, row, a.x_stride);
  const T* residual = row_of<T>(a.residual, row, a.residual_stride);
  T* y = row_of<T>(a.y, row, a.cols);
  const int64_t start = mask_start(a, row);
  const uint32_t bound = drop_below(a.probability);
  const float keep = 1.0f / (1.0f - a.probability);
  for_packs<N>(member, a.cols, [&](int64_t i, int64_t n) {
    Floats<N> value = read<N>(x + i, n);
    const Floats<N> bias = a.bias ? read<N>(a.bias + i, n) : Floats<N>{};
    const Floats<N> other = residual ? read<N>(residual + i, n) : Floats<N>{};
#pragma unroll
    for (int k = 0; k < N; ++k) value.at[k] += bias.at[k];
    if (a.probability > 0) drop(value, seed, start + i, bound, keep);
#pragma unroll
    for (int k = 0; k < N; ++k) value.at[k] += other.at[k];
    write<N>(y + i, n, value);
  });
}

}  // namespace

void bias_dropout_add(const BiasDropoutAdd& a, Stream stream) {
  MEGALM_DISPATCH(a.dtype, T, launch_rows(add_kernel<T>, a.rows, a.cols, kPack<T>, stream, a));
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
