// What a <op>_cuda.cu includes first: launches, 16-byte loads and stores, reductions over a block.
// No torch header: nvcc compiles the kernels on any machine, and the tests run them on a CPU, where MEGALM_EMULATOR
// names the header that stands for the CUDA runtime.
#pragma once
#if defined(MEGALM_EMULATOR)
#include MEGALM_EMULATOR
#else
#include <cuda_runtime.h>
#endif

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

// The launcher of a kernel; under the emulator also found by its name.
#if defined(MEGALM_EMULATOR)
#define MEGALM_KERNEL(name, Arguments)                                         \
  inline namespace MEGALM_ISA {                                                \
  void name(const Arguments& arguments, void* stream);                         \
  }                                                                            \
  static const ::emulator::Launcher name##_launcher(#name, [](const void* a) { \
    name(*static_cast<const Arguments*>(a), nullptr);                          \
  });
#else
#define MEGALM_KERNEL(name, Arguments)                 \
  inline namespace MEGALM_ISA {                        \
  void name(const Arguments& arguments, void* stream); \
  }
#endif
#include "common.h"

namespace megalm {

using Stream = void*;  // a cudaStream_t

inline namespace MEGALM_ISA {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;

struct Grid {
  int64_t blocks;
  int threads;
};

// Runs kernel(arguments...) on a grid; no blocks are no launch.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, Stream stream, const Arguments&... arguments) {
  if (grid.blocks == 0) return;
  const auto blocks = static_cast<unsigned>(grid.blocks), threads = static_cast<unsigned>(grid.threads);
#if defined(MEGALM_EMULATOR)
  (void)stream;
  emulator::launch(blocks, threads, [&] { kernel(arguments...); });
#else
  kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("megalm kernels: ") + cudaGetErrorString(error));
#endif
}

// Elements of a 16-byte load.
template <class T>
constexpr int kPack = 16 / sizeof(T);

// Threads for one row: a power of two below a warp, whole warps beyond, as few as give them shares of equal size.
inline int threads_for(int64_t cols, int pack) {
  const int64_t packs = (cols + pack - 1) / pack;
  if (packs > kWarp) {
    const int64_t rounds = (packs + kMaxThreads - 1) / kMaxThreads, share = (packs + rounds - 1) / rounds;
    return static_cast<int>((share + kWarp - 1) / kWarp * kWarp);
  }
  int threads = 1;
  while (threads < packs) threads *= 2;
  return threads;
}

// A block takes several rows at a time: each has a team of threads of its own.
struct Teams {
  int threads, count;  // of a team; of teams in a block

  Teams(int64_t cols, int pack, int block = 128)
      : threads(threads_for(cols, pack)), count(std::max(1, block / threads)) {}

  // One team a row.
  Grid rows(int64_t number) const { return {(number + count - 1) / count, threads * count}; }
};

// Kernels count rows, and the elements of a row, in 32 bits.
inline void check_size(int64_t rows, int64_t cols) {
  constexpr int64_t most = 0x7fff0000;  // a stride of a whole block may be added
  if (rows > most || cols > most) throw std::runtime_error("megalm kernels: 2^31 rows or columns in one call");
}

// Runs kernel(arguments, threads of a team) with a team for each row.
template <class Arguments>
void launch_rows(void (*kernel)(Arguments, int), int64_t rows, int64_t cols, int pack, Stream stream,
                 const Arguments& arguments) {
  check_size(rows, cols);
  const Teams teams(cols, pack);
  launch(kernel, teams.rows(rows), stream, arguments, teams.threads);
}

// Blocks of a kernel that all multiprocessors together can hold at once.
template <class... Parameters>
int64_t resident_blocks(void (*kernel)(Parameters...), int threads) {
#if defined(MEGALM_EMULATOR)
  (void)kernel, (void)threads;
  return 3;
#else
  int device = 0, processors = 0, blocks = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0);
  if (error != cudaSuccess) throw std::runtime_error(std::string("megalm kernels: ") + cudaGetErrorString(error));
  return std::max<int64_t>(1, static_cast<int64_t>(processors) * blocks);
#endif
}

// Whether wide loads can read the rows of a call: pointers (null ones do not count) and row strides are aligned.
template <class T>
bool aligned(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> strides) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }) &&
         std::all_of(strides.begin(), strides.end(), [](int64_t stride) { return stride % kPack<T> == 0; });
}

template <int bytes>
struct Word;
template <>
struct Word<2> {
  using type = uint16_t;
};
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

// N adjacent elements as they lie in memory.
template <int N, class T>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Raw {
  T at[N];
};

template <int N>
struct Floats {
  float at[N];
};

// Elements p[0] .. p[N - 1] by wide loads: p is aligned to them, or to 16 bytes where they are more.
template <int N, class T>
__device__ __forceinline__ Raw<N, T> load_raw(const T* p) {
  Raw<N, T> raw;
  copy_words<N, T>(raw.at, p);
  return raw;
}

template <int N, class T>
__device__ __forceinline__ Floats<N> floats(const Raw<N, T>& raw) {
  Floats<N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) out.at[i] = to_float(raw.at[i]);
  return out;
}

template <int N, class T>
__device__ __forceinline__ Floats<N> load(const T* p) {
  return floats(load_raw<N>(p));
}

template <int N, class T>
__device__ __forceinline__ void store(T* p, const Floats<N>& x) {
  Raw<N, T> raw;
#pragma unroll
  for (int i = 0; i < N; ++i) raw.at[i] = from_float<T>(x.at[i]);
  copy_words<N, T>(p, raw.at);
}

// The same where p may lie anywhere and only n elements count.
template <int N, class T>
__device__ __forceinline__ bool whole(const T* p, int64_t n) {
  return n >= N && reinterpret_cast<uintptr_t>(p) % alignof(Raw<N, T>) == 0;
}

template <int N, class T>
__device__ __forceinline__ Floats<N> read(const T* p, int64_t n) {
  if (whole<N>(p, n)) return load<N>(p);
  Floats<N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) out.at[i] = i < n ? to_float(p[i]) : 0.0f;
  return out;
}

template <int N, class T>
__device__ __forceinline__ void write(T* p, int64_t n, const Floats<N>& x) {
  if (whole<N>(p, n)) return store(p, x);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < n) p[i] = from_float<T>(x.at[i]);
  }
}

// A thread's place in its team, and the row that the team takes where `launch_rows` started it.
struct Member {
  int rank, size, team;

  __device__ __forceinline__ explicit Member(int threads)
      : rank(static_cast<int>(threadIdx.x) % threads), size(threads), team(static_cast<int>(threadIdx.x) / threads) {}

  // May lie beyond the last one. 32 bits: the device divides 64 by a long subroutine.
  __device__ __forceinline__ unsigned row() const { return blockIdx.x * (blockDim.x / size) + team; }
};

// Whether a team can hold rows of this width in so many 16-byte packs of each thread.
template <class T>
bool fits(int64_t cols, int packs) {
  return cols <= packs * kPack<T> * kMaxThreads;
}

// body(i): elements i .. i + N, for this member's share of a row of `size`, a multiple of N.
template <int N, class Body>
__device__ __forceinline__ void for_packs(const Member& member, int size, Body body) {
  for (int i = member.rank * N; i < size; i += member.size * N) body(i);
}

// The same for rows that fit a team's registers: body(k, i), k the number of the pack in its thread, a constant.
template <int N, int kPacks, class Body>
__device__ __forceinline__ void for_kept(const Member& member, int size, Body body) {
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int i = (k * member.size + member.rank) * N;
    if (i < size) body(k, i);
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

// The team's values combined, for all its members, in an order that never changes. Every thread of the block calls it,
// those of teams without a row too.
template <class F, class Combine>
__device__ F over_team(const Member& member, F x, Combine combine) {
  __shared__ F parts[kMaxThreads / kWarp];
  for (int lanes = (member.size < kWarp ? member.size : kWarp) / 2; lanes > 0; lanes /= 2) {
    x = combine(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  }
  if (member.size <= kWarp) return x;
  __syncthreads();  // the call before may still be reading
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = x;
  __syncthreads();
  const F* mine = parts + member.team * (member.size / kWarp);
  x = mine[0];
  for (int warp = 1; warp < member.size / kWarp; ++warp) x = combine(x, mine[warp]);
  return x;
}

// The team's sums of K values each member has, with the barriers of one.
template <int K>
__device__ __forceinline__ void add_over_team(const Member& member, float (&x)[K]) {
  __shared__ float parts[K][kMaxThreads / kWarp];
  for (int lanes = (member.size < kWarp ? member.size : kWarp) / 2; lanes > 0; lanes /= 2) {
#pragma unroll
    for (int j = 0; j < K; ++j) x[j] += __shfl_xor_sync(0xffffffffu, x[j], lanes);
  }
  if (member.size <= kWarp) return;
  __syncthreads();  // the call before may still be reading
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int j = 0; j < K; ++j) parts[j][threadIdx.x / kWarp] = x[j];
  }
  __syncthreads();
  const int warps = member.size / kWarp, first = member.team * warps;
#pragma unroll
  for (int j = 0; j < K; ++j) {
    x[j] = parts[j][first];
    for (int warp = 1; warp < warps; ++warp) x[j] += parts[j][first + warp];
  }
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
__global__ void __launch_bounds__(kMaxThreads) sum_chunks_kernel(const float* partial, float* out, int chunks,
                                                                 int64_t cols) {
  __shared__ float sums[kMaxThreads];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x % kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  float total = 0.0f;
  if (column < cols) {
#pragma unroll 8
    for (int chunk = static_cast<int>(threadIdx.x) / kWarp; chunk < chunks; chunk += warps) {
      total += partial[chunk * cols + column];
    }
  }
  sums[threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.x >= kWarp || column >= cols) return;
  for (int warp = 1; warp < warps; ++warp) total += sums[threadIdx.x + warp * kWarp];
  out[column] = total;
}

inline void sum_chunks(const float* partial, float* out, int64_t chunks, int64_t cols, Stream stream) {
  launch(sum_chunks_kernel, Grid{(cols + kWarp - 1) / kWarp, kMaxThreads}, stream, partial, out,
         static_cast<int>(chunks), cols);
}

}  // namespace
}  // inline namespace MEGALM_ISA
}  // namespace megalm
