#include "cuda.h"

#include "optimizer.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

constexpr int kThreads = 256;
constexpr int kElements = 4;  // of a thread at a time: 16 bytes of float32
constexpr int64_t kBlock = 4 * kThreads * kElements;  // elements of a block

// As many tensors as the 4 KiB of a launch's arguments hold, so that a model of hundreds of small ones is few launches.
constexpr int kBatch = 48;

template <class Entry>
struct Batch {
  int count;
  Entry at[kBatch];
  int64_t first_block[kBatch + 1];  // block first_block[t] is the first of tensor t

  // The tensor that a block works on.
  __device__ __forceinline__ int tensor_of(int64_t block) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first_block[middle] <= block) low = middle;
      else high = middle;
    }
    return low;
  }
};

// Calls launch_batch(batch) for the tensors in order, those of equal `kind` together; `block` elements are a block.
template <class Entry, class Kind, class Launch>
void in_batches(const Entry* tensors, int64_t count, int64_t block, Kind kind, Launch launch_batch) {
  Batch<Entry> batch{};
  for (int64_t t = 0; t < count; ++t) {
    if (tensors[t].size == 0) continue;
    if (batch.count == kBatch || (batch.count > 0 && kind(tensors[t]) != kind(batch.at[0]))) {
      launch_batch(batch);
      batch.count = 0;
    }
    batch.at[batch.count] = tensors[t];
    batch.first_block[batch.count + 1] = batch.first_block[batch.count] + (tensors[t].size + block - 1) / block;
    ++batch.count;
  }
  if (batch.count > 0) launch_batch(batch);
}

template <class Entry>
Grid grid_of(const Batch<Entry>& batch) {
  return {batch.first_block[batch.count], kThreads};
}

// body(i, n): n elements (kElements at most matter) from i on, for this thread's share of the block's elements.
template <class Body>
__device__ __forceinline__ void for_elements(int64_t block, int64_t size, Body body) {
  for (int64_t i = block * kBlock + static_cast<int64_t>(threadIdx.x) * kElements;
       i < size && i < (block + 1) * kBlock; i += kThreads * kElements) {
    body(i, size - i);
  }
}

template <class G, class M>
__global__ void __launch_bounds__(kThreads) adamw_kernel(AdamW a, const __grid_constant__ Batch<AdamWTensor> batch) {
  constexpr int N = kElements;
  const int t = batch.tensor_of(blockIdx.x);
  float *const masters = batch.at[t].master, *const firsts = batch.at[t].first, *const seconds = batch.at[t].second;
  const G* const grads = static_cast<const G*>(batch.at[t].grad);
  M* const models = static_cast<M*>(batch.at[t].model);
  for_elements(blockIdx.x - batch.first_block[t], batch.at[t].size, [&](int64_t i, int64_t n) {
    Floats<N> weight = read<N>(masters + i, n), first = read<N>(firsts + i, n), second = read<N>(seconds + i, n);
    const Floats<N> grad = read<N>(grads + i, n);
#pragma unroll
    for (int k = 0; k < N; ++k) weight.at[k] = adamw(a, weight.at[k], grad.at[k], first.at[k], second.at[k]);
    write<N>(masters + i, n, weight);
    write<N>(firsts + i, n, first);
    write<N>(seconds + i, n, second);
    if (models) write<N>(models + i, n, weight);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) square_sum_kernel(const __grid_constant__ Batch<SquareSumTensor> batch) {
  constexpr int N = kPack<T>;
  const Member member(kThreads);
  const int t = batch.tensor_of(blockIdx.x);
  const int64_t block = blockIdx.x - batch.first_block[t], start = block * kSquareBlock;
  const int64_t rest = batch.at[t].size - start;
  const T* x = static_cast<const T*>(batch.at[t].x) + start;
  const int size = static_cast<int>(rest < kSquareBlock ? rest : kSquareBlock);
  float total = 0.0f;
  for (int i = member.rank * N; i < size; i += member.size * N) {
    const Floats<N> value = read<N>(x + i, size - i);
#pragma unroll
    for (int k = 0; k < N; ++k) total += value.at[k] * value.at[k];
  }
  const double sum = over_team(member, static_cast<double>(total), Add());
  if (threadIdx.x == 0) batch.at[t].partial[block] = sum;
}

}  // namespace

void adamw_step(const AdamW& a, Stream stream) {
  const auto kind = [](const AdamWTensor& x) { return std::pair(x.grad_dtype, x.model_dtype); };
  in_batches(a.tensors, a.count, kBlock, kind, [&](const Batch<AdamWTensor>& batch) {
    MEGALM_DISPATCH(batch.at[0].grad_dtype, G,
                    MEGALM_DISPATCH(batch.at[0].model_dtype, M,
                                    launch(adamw_kernel<G, M>, grid_of(batch), stream, a, batch)));
  });
}

void square_sum(const SquareSum& a, Stream stream) {
  const auto kind = [](const SquareSumTensor& x) { return x.dtype; };
  in_batches(a.tensors, a.count, kSquareBlock, kind, [&](const Batch<SquareSumTensor>& batch) {
    MEGALM_DISPATCH(batch.at[0].dtype, T, launch(square_sum_kernel<T>, grid_of(batch), stream, batch));
  });
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
