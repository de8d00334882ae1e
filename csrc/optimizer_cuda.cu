#include "cuda.h"

#include "optimizer.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

constexpr int kThreads = 256;
constexpr int kElements = 4;  // of a thread: 16 bytes of float32

inline int64_t blocks_for(int64_t size) { return (size + kThreads * kElements - 1) / (kThreads * kElements); }

template <class G, class M>
__global__ void __launch_bounds__(kThreads) adamw_kernel(AdamW a) {
  constexpr int N = kElements;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N, n = a.size - i;
  if (n <= 0) return;
  Floats<N> weight = read<N>(a.master + i, n), first = read<N>(a.first + i, n), second = read<N>(a.second + i, n);
  const Floats<N> grad = read<N>(static_cast<const G*>(a.grad) + i, n);
#pragma unroll
  for (int k = 0; k < N; ++k) weight.at[k] = adamw(a, weight.at[k], grad.at[k], first.at[k], second.at[k]);
  write<N>(a.master + i, n, weight);
  write<N>(a.first + i, n, first);
  write<N>(a.second + i, n, second);
  if (a.model) write<N>(static_cast<M*>(a.model) + i, n, weight);
}

template <class T>
__global__ void __launch_bounds__(kThreads) square_sum_kernel(SquareSum a) {
  constexpr int N = kPack<T>;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kSquareBlock, rest = a.size - start;
  const T* x = static_cast<const T*>(a.x) + start;
  float total = 0.0f;
  for_packs<N>(rest < kSquareBlock ? rest : kSquareBlock, [&](int64_t i, int64_t n) {
    const Floats<N> value = read<N>(x + i, n);
#pragma unroll
    for (int k = 0; k < N; ++k) total += value.at[k] * value.at[k];
  });
  const double sum = over_block(static_cast<double>(total), Add());
  if (threadIdx.x == 0) a.partial[blockIdx.x] = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) scale_kernel(Scale a) {
  constexpr int N = kElements;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N, n = a.size - i;
  if (n <= 0) return;
  Floats<N> value = read<N>(static_cast<const T*>(a.x) + i, n);
#pragma unroll
  for (int k = 0; k < N; ++k) value.at[k] *= a.factor;
  write<N>(static_cast<T*>(a.x) + i, n, value);
}

}  // namespace

void adamw_step(const AdamW& a, Stream stream) {
  MEGALM_DISPATCH(a.grad_dtype, G,
                  MEGALM_DISPATCH(a.model_dtype, M,
                                  launch(adamw_kernel<G, M>, blocks_for(a.size), kThreads, stream, a)));
}

void square_sum(const SquareSum& a, Stream stream) {
  const int64_t blocks = (a.size + kSquareBlock - 1) / kSquareBlock;
  MEGALM_DISPATCH(a.dtype, T, launch(square_sum_kernel<T>, blocks, kThreads, stream, a));
}

void scale(const Scale& a, Stream stream) {
  MEGALM_DISPATCH(a.dtype, T, launch(scale_kernel<T>, blocks_for(a.size), kThreads, stream, a));
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
