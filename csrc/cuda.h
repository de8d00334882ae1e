// What a <op>_cuda.cu includes first: launches, 16-byte loads and stores, reductions over a block.
// No torch header: nvcc compiles the kernels on any machine, and the tests run them on a CPU, where MEGALM_EMULATOR
// names the header that stands for the CUDA runtime.
#pragma once
#if defined(MEGALM_EMULATOR)
#include MEGALM_EMULATOR
#else
#include <cuda_runtime.h>
#endif

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace megalm {

using Stream = void*;  // a cudaStream_t

inline namespace MEGALM_ISA {
#define MEGALM_DECLARE(name, Arguments) void name(const Arguments& arguments, Stream stream);
MEGALM_KERNELS(MEGALM_DECLARE)
#undef MEGALM_DECLARE

namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;

// Runs kernel(arguments...) on `blocks` x `layers` blocks; no blocks are no launch.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, Stream stream, const Arguments&... arguments) {
  if (blocks == 0) return;
  if (blocks > 0x7fffffff) throw std::runtime_error("megalm kernels: more than 2^31 rows in one call");
#if defined(MEGALM_EMULATOR)
  (void)stream;
  emulator::launch(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), [&] { kernel(arguments...); });
#else
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("megalm kernels: ") + cudaGetErrorString(error));
#endif
}

// Elements of a 16-byte load.
template <class T>
constexpr int kPack = 16 / sizeof(T);

// Threads for one row, whole warps.
inline int threads_for(int64_t cols, int pack) {
  const int64_t packs = (cols + pack - 1) / pack, warps = (packs + kWarp - 1) / kWarp;
  return static_cast<int>(warps < 1 ? kWarp : (warps * kWarp > kMaxThreads ? kMaxThreads : warps * kWarp));
}

template <int bytes>
struct Word;
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// Copies N elements in words of at most 16 bytes; `to` and `from` are aligned to a word.
template <int N, class T>
__device__ __forceinline__ void copy_words(void* to, const void* from) {
  constexpr int bytes = N * sizeof(T) < 16 ? N * sizeof(T) : 16;
  using word = typename Word<bytes>::type;
#pragma unroll
  for (int i = 0; i < static_cast<int>(N * sizeof(T)) / bytes; ++i) {
    static_cast<word*>(to)[i] = static_cast<const word*>(from)[i];
  }
}

template <int N, class T>
__device__ __forceinline__ bool whole(const T* p, int64_t n) {
  constexpr int bytes = N * sizeof(T) < 16 ? N * sizeof(T) : 16;
  return n >= N && reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

template <int N>
struct Floats {
  float at[N];
};

// The first N of n elements as floats; those beyond the end are `rest`.
template <int N, class T>
__device__ __forceinline__ Floats<N> read(const T* p, int64_t n, float rest = 0.0f) {
  Floats<N> out;
  if (whole<N>(p, n)) {
    alignas(16) T raw[N];
    copy_words<N, T>(raw, p);
#pragma unroll
    for (int i = 0; i < N; ++i) out.at[i] = to_float(raw[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out.at[i] = i < n ? to_float(p[i]) : rest;
  }
  return out;
}

template <int N, class T>
__device__ __forceinline__ void write(T* p, int64_t n, const Floats<N>& x) {
  if (whole<N>(p, n)) {
    alignas(16) T raw[N];
#pragma unroll
    for (int i = 0; i < N; ++i) raw[i] = from_float<T>(x.at[i]);
    copy_words<N, T>(p, raw);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < n) p[i] = from_float<T>(x.at[i]);
    }
  }
}

// body(i, n): n elements (N at most matter) from i on, for this thread's share of a row of `size`.
template <int N, class Body>
__device__ __forceinline__ void for_packs(int64_t size, Body body) {
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * N; i < size; i += static_cast<int64_t>(blockDim.x) * N) {
    body(i, size - i);
  }
}

// The largest, or NaN where there is one.
__device__ __forceinline__ float larger(float a, float b) { return a > b || a != a ? a : b; }

struct Add {
  template <class F>
  __device__ __forceinline__ F operator()(F a, F b) const {
    return a + b;
  }
};
struct Larger {
  __device__ __forceinline__ float operator()(float a, float b) const { return larger(a, b); }
};

// The block's values combined, for every thread, in an order that never changes.
template <class F, class Combine>
__device__ F over_block(F x, Combine combine) {
  __shared__ F parts[kMaxThreads / kWarp];
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, offset));
  __syncthreads();  // the call before may still be reading
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = parts[0];
  for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) x = combine(x, parts[warp]);
  return x;
}

template <class T>
__device__ __forceinline__ const T* row_of(const void* p, int64_t row, int64_t stride) {
  return p ? static_cast<const T*>(p) + row * stride : nullptr;
}
template <class T>
__device__ __forceinline__ T* row_of(void* p, int64_t row, int64_t stride) {
  return p ? static_cast<T*>(p) + row * stride : nullptr;
}

// out[c] = sum of partial[chunk, c]: a warp-wide strip of columns for each block.
__global__ void sum_chunks_kernel(const float* partial, float* out, int64_t chunks, int64_t cols) {
  __shared__ float sums[kMaxThreads];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x % kWarp;
  float total = 0.0f;
  for (int64_t chunk = threadIdx.x / kWarp; chunk < chunks && column < cols; chunk += blockDim.x / kWarp) {
    total += partial[chunk * cols + column];
  }
  sums[threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.x >= kWarp || column >= cols) return;
  for (unsigned i = threadIdx.x + kWarp; i < blockDim.x; i += kWarp) total += sums[i];
  out[column] = total;
}

inline void sum_chunks(const float* partial, float* out, int64_t chunks, int64_t cols, Stream stream) {
  launch(sum_chunks_kernel, (cols + kWarp - 1) / kWarp, 8 * kWarp, stream, partial, out, chunks, cols);
}

}  // namespace
}  // inline namespace MEGALM_ISA
}  // namespace megalm
