#include "cuda.h"

#include "norm.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

// One block a row; what the first pass reads comes from the first cache in the later ones.
template <class T>
__global__ void __launch_bounds__(kMaxThreads) forward_kernel(NormForward a) {
  constexpr int N = kPack<T>;
  const int64_t row = blockIdx.x;
  const T* x = row_of<T>(a.x, row, a.x_stride);
  const T* residual = row_of<T>(a.residual, row, a.residual_stride);
  T *sum = row_of<T>(a.sum, row, a.cols), *y = row_of<T>(a.y, row, a.cols);
  float total = 0.0f;
  if (a.center || residual) {
    for_packs<N>(a.cols, [&](int64_t i, int64_t n) {
      Floats<N> value = read<N>(x + i, n);
      if (residual) {
        const Floats<N> other = read<N>(residual + i, n);
#pragma unroll
        for (int k = 0; k < N; ++k) value.at[k] = to_float(from_float<T>(value.at[k] + other.at[k]));
        write<N>(sum + i, n, value);
      }
#pragma unroll
      for (int k = 0; k < N; ++k) total += value.at[k];
    });
  }
  if (residual) x = sum;  // each thread reads only what it wrote
  const float mean = a.center ? over_block(total, Add()) / a.cols : 0.0f;
  float squares = 0.0f;
  for_packs<N>(a.cols, [&](int64_t i, int64_t n) {
    const Floats<N> value = read<N>(x + i, n, mean);
#pragma unroll
    for (int k = 0; k < N; ++k) squares += (value.at[k] - mean) * (value.at[k] - mean);
  });
  const float rstd = 1.0f / sqrtf(over_block(squares, Add()) / a.cols + a.epsilon);
  if (threadIdx.x == 0) {
    a.rstd[row] = rstd;
    if (a.center) a.mean[row] = mean;
  }
  for_packs<N>(a.cols, [&](int64_t i, int64_t n) {
    Floats<N> value = read<N>(x + i, n);
    const Floats<N> weight = read<N>(a.weight + i, n);
    const Floats<N> bias = a.bias ? read<N>(a.bias + i, n) : Floats<N>{};
#pragma unroll
    for (int k = 0; k < N; ++k) value.at[k] = norm_output(value.at[k], mean, rstd, weight.at[k], bias.at[k]);
    write<N>(y + i, n, value);
  });
}

// Columns whose sums over a chunk's rows fit in 48 KiB of shared memory; wider rows add in the work space itself.
constexpr int kSharedCols = 6128;

template <class T>
__device__ void backward_row(const NormBackward& a, int64_t row, float* to_weight, float* to_bias) {
  constexpr int N = kPack<T>;
  const T *x = row_of<T>(a.x, row, a.x_stride), *grad = row_of<T>(a.grad, row, a.grad_stride);
  const T* grad_sum = row_of<T>(a.grad_sum, row, a.grad_sum_stride);
  T* out = row_of<T>(a.grad_x, row, a.cols);
  const float mean = a.center ? a.mean[row] : 0.0f, rstd = a.rstd[row];
  float sum_gw = 0.0f, sum_gwx = 0.0f;
  for_packs<N>(a.cols, [&](int64_t i, int64_t n) {
    const Floats<N> g = read<N>(grad + i, n), value = read<N>(x + i, n), weight = read<N>(a.weight + i, n);
    Floats<N> weights = read<N>(to_weight + i, n);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float xhat = normalized(value.at[k], mean, rstd), gw = g.at[k] * weight.at[k];
      sum_gw += gw;
      sum_gwx += gw * xhat;
      weights.at[k] += g.at[k] * xhat;
    }
    write<N>(to_weight + i, n, weights);
    if (!to_bias) return;
    Floats<N> biases = read<N>(to_bias + i, n);
#pragma unroll
    for (int k = 0; k < N; ++k) biases.at[k] += g.at[k];
    write<N>(to_bias + i, n, biases);
  });
  const float mean_gw = a.center ? over_block(sum_gw, Add()) / a.cols : 0.0f;
  const float mean_gwx = over_block(sum_gwx, Add()) / a.cols;
  for_packs<N>(a.cols, [&](int64_t i, int64_t n) {
    Floats<N> g = read<N>(grad + i, n);
    const Floats<N> value = read<N>(x + i, n), weight = read<N>(a.weight + i, n);
    const Floats<N> other = grad_sum ? read<N>(grad_sum + i, n) : Floats<N>{};
#pragma unroll
    for (int k = 0; k < N; ++k) {
      g.at[k] = norm_grad(g.at[k], weight.at[k], value.at[k], mean, rstd, mean_gw, mean_gwx) + other.at[k];
    }
    write<N>(out + i, n, g);
  });
}

// One block a chunk of rows; a thread owns the same columns in every row.
template <class T>
__global__ void __launch_bounds__(kMaxThreads) backward_kernel(NormBackward a) {
  constexpr int N = kPack<T>;
  __shared__ float4 shared_weight[kSharedCols / 4], shared_bias[kSharedCols / 4];
  const int64_t chunk = blockIdx.x;
  const bool fits = a.cols <= kSharedCols;
  float* partial_weight = a.partial_weight + chunk * a.cols;
  float* partial_bias = a.partial_bias ? a.partial_bias + chunk * a.cols : nullptr;
  float* to_weight = fits ? &shared_weight[0].x : partial_weight;
  float* to_bias = partial_bias ? (fits ? &shared_bias[0].x : partial_bias) : nullptr;
  for_packs<N>(a.cols, [&](int64_t i, int64_t n) {
    write<N>(to_weight + i, n, Floats<N>{});
    if (to_bias) write<N>(to_bias + i, n, Floats<N>{});
  });
  const int64_t stop = a.rows * (chunk + 1) / a.chunks;
  for (int64_t row = a.rows * chunk / a.chunks; row < stop; ++row) backward_row<T>(a, row, to_weight, to_bias);
  if (!fits) return;
  for_packs<N>(a.cols, [&](int64_t i, int64_t n) {
    write<N>(partial_weight + i, n, read<N>(to_weight + i, n));
    if (to_bias) write<N>(partial_bias + i, n, read<N>(to_bias + i, n));
  });
}

}  // namespace

void norm_forward(const NormForward& a, Stream stream) {
  MEGALM_DISPATCH(a.dtype, T, launch(forward_kernel<T>, a.rows, threads_for(a.cols, kPack<T>), stream, a));
}

void norm_backward(const NormBackward& a, Stream stream) {
  MEGALM_DISPATCH(a.dtype, T, launch(backward_kernel<T>, a.chunks, threads_for(a.cols, kPack<T>), stream, a));
  sum_chunks(a.partial_weight, a.grad_weight, a.chunks, a.cols, stream);
  if (a.grad_bias) sum_chunks(a.partial_bias, a.grad_bias, a.chunks, a.cols, stream);
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
