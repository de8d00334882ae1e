#include "cuda.h"

#include "norm.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

// 16-byte packs of a row that a thread can hold in registers; the sums of the backward need registers too. Wider rows are
// read again for every pass.
constexpr int kForwardPacks = 4, kBackwardPacks = 2;

// One team a row, which it reads once.
template <class T, bool kResidual>
__global__ void __launch_bounds__(kMaxThreads) kept_forward_kernel(NormForward a, int threads) {
  constexpr int N = kPack<T>;
  const Member member(threads);
  const int64_t row = member.row();
  const int cols = row < a.rows ? static_cast<int>(a.cols) : 0;
  const T* x = row_of<T>(a.x, row, a.x_stride);
  const T* residual = row_of<T>(a.residual, row, a.residual_stride);
  T *sum = row_of<T>(a.sum, row, a.cols), *y = row_of<T>(a.y, row, a.cols);
  Raw<N, T> row_x[kForwardPacks], other[kResidual ? kForwardPacks : 1];
  for_kept<N, kForwardPacks>(member, cols, [&](int k, int i) { row_x[k] = load_raw<N>(x + i); });
  float total[1] = {};
  if constexpr (kResidual) {
    for_kept<N, kForwardPacks>(member, cols, [&](int k, int i) { other[k] = load_raw<N>(residual + i); });
    for_kept<N, kForwardPacks>(member, cols, [&](int k, int i) {
      const Floats<N> value = floats(row_x[k]), added = floats(other[k]);
#pragma unroll
      for (int j = 0; j < N; ++j) row_x[k].at[j] = from_float<T>(value.at[j] + added.at[j]);
      copy_words<N, T>(sum + i, row_x[k].at);
    });
  }
  if (a.center) {
    for_kept<N, kForwardPacks>(member, cols, [&](int k, int) {
      const Floats<N> value = floats(row_x[k]);
#pragma unroll
      for (int j = 0; j < N; ++j) total[0] += value.at[j];
    });
    add_over_team(member, total);
  }
  const float scale = 1.0f / static_cast<float>(a.cols), mean = total[0] * scale;
  float squares[1] = {};
  for_kept<N, kForwardPacks>(member, cols, [&](int k, int) {
    const Floats<N> value = floats(row_x[k]);
#pragma unroll
    for (int j = 0; j < N; ++j) squares[0] += (value.at[j] - mean) * (value.at[j] - mean);
  });
  add_over_team(member, squares);
  const float rstd = 1.0f / sqrtf(squares[0] * scale + a.epsilon);
  if (member.rank == 0 && row < a.rows) {
    a.rstd[row] = rstd;
    if (a.center) a.mean[row] = mean;
  }
  for_kept<N, kForwardPacks>(member, cols, [&](int k, int i) {
    Floats<N> value = floats(row_x[k]);
    const Floats<N> weight = load<N>(a.weight + i);
    const Floats<N> bias = a.bias ? load<N>(a.bias + i) : Floats<N>{};
#pragma unroll
    for (int j = 0; j < N; ++j) value.at[j] = norm_output(value.at[j], mean, rstd, weight.at[j], bias.at[j]);
    store(y + i, value);
  });
}

// The same for rows of any width: what the first pass reads comes from the first cache in the later ones.
template <class T, int N>
__global__ void __launch_bounds__(kMaxThreads) forward_kernel(NormForward a, int threads) {
  const Member member(threads);
  const int64_t row = member.row();
  const int cols = row < a.rows ? static_cast<int>(a.cols) : 0;
  const T* x = row_of<T>(a.x, row, a.x_stride);
  const T* residual = row_of<T>(a.residual, row, a.residual_stride);
  T *sum = row_of<T>(a.sum, row, a.cols), *y = row_of<T>(a.y, row, a.cols);
  float total[1] = {}, squares[1] = {};
  if (a.center || residual) {
    for_packs<N>(member, cols, [&](int i) {
      Floats<N> value = load<N>(x + i);
      if (residual) {
        const Floats<N> other = load<N>(residual + i);
#pragma unroll
        for (int k = 0; k < N; ++k) value.at[k] = to_float(from_float<T>(value.at[k] + other.at[k]));
        store(sum + i, value);
      }
#pragma unroll
      for (int k = 0; k < N; ++k) total[0] += value.at[k];
    });
  }
  if (residual) x = sum;  // each thread reads only what it wrote
  if (a.center) add_over_team(member, total);
  const float mean = a.center ? total[0] / static_cast<float>(a.cols) : 0.0f;
  for_packs<N>(member, cols, [&](int i) {
    const Floats<N> value = load<N>(x + i);
#pragma unroll
    for (int k = 0; k < N; ++k) squares[0] += (value.at[k] - mean) * (value.at[k] - mean);
  });
  add_over_team(member, squares);
  const float rstd = 1.0f / sqrtf(squares[0] / static_cast<float>(a.cols) + a.epsilon);
  if (member.rank == 0 && row < a.rows) {
    a.rstd[row] = rstd;
    if (a.center) a.mean[row] = mean;
  }
  for_packs<N>(member, cols, [&](int i) {
    Floats<N> value = load<N>(x + i);
    const Floats<N> weight = load<N>(a.weight + i);
    const Floats<N> bias = a.bias ? load<N>(a.bias + i) : Floats<N>{};
#pragma unroll
    for (int k = 0; k < N; ++k) value.at[k] = norm_output(value.at[k], mean, rstd, weight.at[k], bias.at[k]);
    store(y + i, value);
  });
}

// What the backward of a row reads, in the registers of its block.
template <class T, int kPacks>
struct Incoming {
  static constexpr int N = kPack<T>;
  Raw<N, T> x[kPacks], grad[kPacks];
  float mean, rstd;

  __device__ __forceinline__ void load(const NormBackward& a, const Member& member, int64_t row) {
    const T *from_x = row_of<T>(a.x, row, a.x_stride), *from_grad = row_of<T>(a.grad, row, a.grad_stride);
    mean = a.center ? a.mean[row] : 0.0f;
    rstd = a.rstd[row];
    for_kept<N, kPacks>(member, static_cast<int>(a.cols), [&](int k, int i) {
      x[k] = load_raw<N>(from_x + i);
      grad[k] = load_raw<N>(from_grad + i);
    });
  }
};

// One block a chunk of rows: each thread owns the same columns in all of them, and sums for weight and bias over them.
// The loads of a row are under way while the one before is worked on.
template <class T, int kPacks, bool kBias>
__global__ void __launch_bounds__(kMaxThreads, kPacks == 1 ? 2 : 1) kept_backward_kernel(NormBackward a) {
  constexpr int N = kPack<T>;
  const Member member(static_cast<int>(blockDim.x));
  const int cols = static_cast<int>(a.cols);
  const int64_t chunk = blockIdx.x, chunks = gridDim.x, stop = a.rows * (chunk + 1) / chunks;
  const float scale = 1.0f / static_cast<float>(a.cols);
  Floats<N> to_weight[kPacks] = {}, to_bias[kPacks] = {};
  Incoming<T, kPacks> next;
  int64_t row = a.rows * chunk / chunks;
  if (row < stop) next.load(a, member, row);
  for (; row < stop; ++row) {
    const Incoming<T, kPacks> now = next;
    if (row + 1 < stop) next.load(a, member, row + 1);
    const T* grad_sum = row_of<T>(a.grad_sum, row, a.grad_sum_stride);
    T* out = row_of<T>(a.grad_x, row, a.cols);
    Raw<N, T> raw_sum[kPacks];
    if (grad_sum) for_kept<N, kPacks>(member, cols, [&](int k, int i) { raw_sum[k] = load_raw<N>(grad_sum + i); });
    float sums[2] = {};  // of g w, and of g w xhat
    for_kept<N, kPacks>(member, cols, [&](int k, int i) {
      const Floats<N> value = floats(now.x[k]), g = floats(now.grad[k]), weight = load<N>(a.weight + i);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float xhat = normalized(value.at[j], now.mean, now.rstd), gw = g.at[j] * weight.at[j];
        sums[0] += gw;
        sums[1] += gw * xhat;
        to_weight[k].at[j] += g.at[j] * xhat;
        if (kBias) to_bias[k].at[j] += g.at[j];
      }
    });
    add_over_team(member, sums);
    const float mean_gw = a.center ? sums[0] * scale : 0.0f, mean_gwx = sums[1] * scale;
    for_kept<N, kPacks>(member, cols, [&](int k, int i) {
      const Floats<N> value = floats(now.x[k]), weight = load<N>(a.weight + i);
      Floats<N> g = floats(now.grad[k]);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        g.at[j] = norm_grad(g.at[j], weight.at[j], value.at[j], now.mean, now.rstd, mean_gw, mean_gwx);
      }
      if (grad_sum) {
        const Floats<N> other = floats(raw_sum[k]);
#pragma unroll
        for (int j = 0; j < N; ++j) g.at[j] += other.at[j];
      }
      store(out + i, g);
    });
  }
  for_kept<N, kPacks>(member, cols, [&](int k, int i) {
    store(a.partial_weight + chunk * a.cols + i, to_weight[k]);
    if (kBias) store(a.partial_bias + chunk * a.cols + i, to_bias[k]);
  });
}

// The same for rows of any width: the sums for weight and bias are kept in the work space, every thread's its own.
template <class T, int N>
__global__ void __launch_bounds__(kMaxThreads) backward_kernel(NormBackward a) {
  const Member member(static_cast<int>(blockDim.x));
  const int cols = static_cast<int>(a.cols);
  const int64_t chunk = blockIdx.x, chunks = gridDim.x, stop = a.rows * (chunk + 1) / chunks;
  const float scale = 1.0f / static_cast<float>(a.cols);
  float* to_weight = a.partial_weight + chunk * a.cols;
  float* to_bias = a.partial_bias ? a.partial_bias + chunk * a.cols : nullptr;
  for_packs<N>(member, cols, [&](int i) {
    store(to_weight + i, Floats<N>{});
    if (to_bias) store(to_bias + i, Floats<N>{});
  });
  for (int64_t row = a.rows * chunk / chunks; row < stop; ++row) {
    const T *x = row_of<T>(a.x, row, a.x_stride), *grad = row_of<T>(a.grad, row, a.grad_stride);
    const T* grad_sum = row_of<T>(a.grad_sum, row, a.grad_sum_stride);
    T* out = row_of<T>(a.grad_x, row, a.cols);
    const float mean = a.center ? a.mean[row] : 0.0f, rstd = a.rstd[row];
    float sums[2] = {};
    for_packs<N>(member, cols, [&](int i) {
      const Floats<N> g = load<N>(grad + i), value = load<N>(x + i), weight = load<N>(a.weight + i);
      Floats<N> weights = load<N>(to_weight + i), biases = to_bias ? load<N>(to_bias + i) : Floats<N>{};
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const float xhat = normalized(value.at[k], mean, rstd), gw = g.at[k] * weight.at[k];
        sums[0] += gw;
        sums[1] += gw * xhat;
        weights.at[k] += g.at[k] * xhat;
        biases.at[k] += g.at[k];
      }
      store(to_weight + i, weights);
      if (to_bias) store(to_bias + i, biases);
    });
    add_over_team(member, sums);
    const float mean_gw = a.center ? sums[0] * scale : 0.0f, mean_gwx = sums[1] * scale;
    for_packs<N>(member, cols, [&](int i) {
      Floats<N> g = load<N>(grad + i);
      const Floats<N> value = load<N>(x + i), weight = load<N>(a.weight + i);
      const Floats<N> other = grad_sum ? load<N>(grad_sum + i) : Floats<N>{};
#pragma unroll
      for (int k = 0; k < N; ++k) {
        g.at[k] = norm_grad(g.at[k], weight.at[k], value.at[k], mean, rstd, mean_gw, mean_gwx) + other.at[k];
      }
      store(out + i, g);
    });
  }
}

template <class T>
void launch_forward(const NormForward& a, Stream stream) {
  const bool wide =
      aligned<T>({a.x, a.residual, a.weight, a.bias, a.y, a.sum}, {a.cols, a.x_stride, a.residual_stride});
  if (wide && fits<T>(a.cols, kForwardPacks)) {
    const auto kernel = a.residual ? kept_forward_kernel<T, true> : kept_forward_kernel<T, false>;
    return launch_rows(kernel, a.rows, a.cols, kForwardPacks * kPack<T>, stream, a);
  }
  if (wide) launch_rows(forward_kernel<T, kPack<T>>, a.rows, a.cols, kPack<T>, stream, a);
  else launch_rows(forward_kernel<T, 1>, a.rows, a.cols, 1, stream, a);
}

// As many chunks as can run at once, so that all blocks end together; returns their number.
int64_t launch_chunks(void (*kernel)(NormBackward), int pack, const NormBackward& a, Stream stream) {
  check_size(a.rows, a.cols);
  const int threads = std::max(kWarp, threads_for(a.cols, pack));
  const int64_t chunks = std::min(a.chunks, resident_blocks(kernel, threads));
  launch(kernel, Grid{chunks, threads}, stream, a);
  return chunks;
}

template <class T, int kPacks>
int64_t launch_kept_backward(const NormBackward& a, Stream stream) {
  const auto kernel = a.partial_bias ? kept_backward_kernel<T, kPacks, true> : kept_backward_kernel<T, kPacks, false>;
  return launch_chunks(kernel, kPacks * kPack<T>, a, stream);
}

template <class T>
int64_t launch_backward(const NormBackward& a, Stream stream) {
  const bool wide =
      aligned<T>({a.x, a.grad, a.grad_sum, a.weight, a.grad_x, a.partial_weight, a.partial_bias},
                 {a.cols, a.x_stride, a.grad_stride, a.grad_sum ? a.grad_sum_stride : 0});
  if (wide && fits<T>(a.cols, 1)) return launch_kept_backward<T, 1>(a, stream);
  if (wide && fits<T>(a.cols, kBackwardPacks)) return launch_kept_backward<T, kBackwardPacks>(a, stream);
  return wide ? launch_chunks(backward_kernel<T, kPack<T>>, kPack<T>, a, stream)
              : launch_chunks(backward_kernel<T, 1>, 1, a, stream);
}

}  // namespace

void norm_forward(const NormForward& a, Stream stream) {
  MEGALM_DISPATCH(a.dtype, T, launch_forward<T>(a, stream));
}

void norm_backward(const NormBackward& a, Stream stream) {
  int64_t chunks = 0;
  MEGALM_DISPATCH(a.dtype, T, chunks = launch_backward<T>(a, stream));
  sum_chunks(a.partial_weight, a.grad_weight, chunks, a.cols, stream);
  if (a.grad_bias) sum_chunks(a.partial_bias, a.grad_bias, chunks, a.cols, stream);
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
