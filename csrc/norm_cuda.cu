#include "cuda.h"

#include "norm.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

// One team a row; what the first pass reads comes from the first cache in the later ones.
template <class T>
__global__ void __launch_bounds__(kMaxThreads) forward_kernel(NormForward a, int threads) {
  constexpr int N = kPack<T>;
  const Member member(threads);
  const int64_t row = member.row(), cols = row < a.rows ? a.cols : 0;
  const T* x = row_of<T>(a.x, row, a.x_stride);
  const T* residual = row_of<T>(a.residual, row, a.residual_stride);
  T *sum = row_of<T>(a.sum, row, a.cols), *y = row_of<T>(a.y, row, a.cols);
  float total = 0.0f;
  if (a.center || residual) {
    for_packs<N>(member, cols, [&](int64_t i, int64_t n) {
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
  const float mean = a.center ? over_team(member, total, Add()) / a.cols : 0.0f;
  float squares = 0.0f;
  for_packs<N>(member, cols, [&](int64_t i, int64_t n) {
    const Floats<N> value = read<N>(x + i, n, mean);
#pragma unroll
    for (int k = 0; k < N; ++k) squares += (value.at[k] - mean) * (value.at[k] - mean);
  });
  const float rstd = 1.0f / sqrtf(over_team(member, squares, Add()) / a.cols + a.epsilon);
  if (member.rank == 0 && row < a.rows) {
    a.rstd[row] = rstd;
    if (a.center) a.mean[row] = mean;
  }
  for_packs<N>(member, cols, [&](int64_t i, int64_t n) {
    Floats<N> value = read<N>(x + i, n);
    const Floats<N> weight = read<N>(a.weight + i, n);
    const Floats<N> bias = a.bias ? read<N>(a.bias + i, n) : Floats<N>{};
#pragma unroll
    for (int k = 0; k < N; ++k) value.at[k] = norm_output(value.at[k], mean, rstd, weight.at[k], bias.at[k]);
    write<N>(y + i, n, value);
  });
}

// Sums over rows of a chunk: `pitch` floats for each team, in shared memory; where that is too small there is one team,
// which adds in the work space itself.
struct Sums {
  int64_t pitch;
  bool shared;
};

constexpr int kBackwardPack = 4;  // with more, 64 registers and so two blocks for each multiprocessor would not do
constexpr int64_t kSharedBytes = 48 * 1024 - 1024;  // the reductions need a little besides

template <class T>
__device__ void backward_row(const NormBackward& a, const Member& member, int64_t row, int64_t cols, float* to_weight,
                             float* to_bias) {
  constexpr int N = kBackwardPack;
  const T *x = row_of<T>(a.x, row, a.x_stride), *grad = row_of<T>(a.grad, row, a.grad_stride);
  const T* grad_sum = row_of<T>(a.grad_sum, row, a.grad_sum_stride);
  T* out = row_of<T>(a.grad_x, row, a.cols);
  const float mean = a.center && cols > 0 ? a.mean[row] : 0.0f, rstd = cols > 0 ? a.rstd[row] : 0.0f;
  float sum_gw = 0.0f, sum_gwx = 0.0f;
  for_packs<N>(member, cols, [&](int64_t i, int64_t n) {
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
  const float mean_gw = a.center ? over_team(member, sum_gw, Add()) / a.cols : 0.0f;
  const float mean_gwx = over_team(member, sum_gwx, Add()) / a.cols;
  for_packs<N>(member, cols, [&](int64_t i, int64_t n) {
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

// out[c] = the sum of the teams' sums, in their order.
__device__ __forceinline__ void add_teams(const float* sums, int teams, int64_t pitch, int64_t cols, float* out) {
  for (int64_t c = threadIdx.x; c < cols; c += blockDim.x) {
    float total = sums[c];
    for (int team = 1; team < teams; ++team) total += sums[team * pitch + c];
    out[c] = total;
  }
}

// One block a chunk of rows, which its teams take by turns; a thread owns the same columns in every row.
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 2) backward_kernel(NormBackward a, Sums sums, int threads) {
  constexpr int N = kBackwardPack;
  const Member member(threads);
  const int teams = static_cast<int>(blockDim.x) / threads;
  const int64_t chunk = blockIdx.x, size = teams * sums.pitch;
  float* partial_weight = a.partial_weight + chunk * a.cols;
  float* partial_bias = a.partial_bias ? a.partial_bias + chunk * a.cols : nullptr;
  float* const weights = sums.shared ? dynamic_shared() : partial_weight;
  float* const biases = partial_bias ? (sums.shared ? weights + size : partial_bias) : nullptr;
  float* to_weight = weights + member.team * sums.pitch;
  float* to_bias = biases ? biases + member.team * sums.pitch : nullptr;
  for_packs<N>(member, a.cols, [&](int64_t i, int64_t n) {
    write<N>(to_weight + i, n, Floats<N>{});
    if (to_bias) write<N>(to_bias + i, n, Floats<N>{});
  });
  const int64_t stop = a.rows * (chunk + 1) / a.chunks;
  for (int64_t first = a.rows * chunk / a.chunks; first < stop; first += teams) {
    const int64_t row = first + member.team;
    backward_row<T>(a, member, row, row < stop ? a.cols : 0, to_weight, to_bias);
  }
  if (!sums.shared) return;
  __syncthreads();
  add_teams(weights, teams, sums.pitch, a.cols, partial_weight);
  if (biases) add_teams(biases, teams, sums.pitch, a.cols, partial_bias);
}

template <class T>
void launch_backward(const NormBackward& a, Stream stream) {
  constexpr int64_t kAlign = 16 / sizeof(float);
  const Teams teams(a.cols, kBackwardPack, kMaxThreads);
  const int64_t pitch = (a.cols + kAlign - 1) / kAlign * kAlign;
  const int64_t bytes = teams.count * pitch * (a.partial_bias ? 2 : 1) * static_cast<int64_t>(sizeof(float));
  const bool shared = bytes <= kSharedBytes;
  const Sums sums{shared ? pitch : 0, shared};
  launch(backward_kernel<T>, Grid{a.chunks, teams.threads * teams.count, shared ? bytes : 0}, stream, a, sums,
         teams.threads);
}

}  // namespace

void norm_forward(const NormForward& a, Stream stream) {
  MEGALM_DISPATCH(a.dtype, T, launch_rows(forward_kernel<T>, a.rows, a.cols, kPack<T>, stream, a));
}

void norm_backward(const NormBackward& a, Stream stream) {
  MEGALM_DISPATCH(a.dtype, T, launch_backward<T>(a, stream));
  sum_chunks(a.partial_weight, a.grad_weight, a.chunks, a.cols, stream);
  if (a.grad_bias) sum_chunks(a.partial_bias, a.grad_bias, a.chunks, a.cols, stream);
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
