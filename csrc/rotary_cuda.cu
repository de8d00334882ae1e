#include "cuda.h"

#include "rotary.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

// One team a token; a thread turns one pack of pairs of one head, so that y may be x.
template <class T>
__global__ void __launch_bounds__(kMaxThreads) rotary_kernel(Rotary a, int threads) {
  constexpr int N = kPack<T>;
  const Member member(threads);
  const unsigned row = member.row(), length = static_cast<unsigned>(a.length);
  const int64_t b = row / length, t = row % length;
  if (b >= a.batch) return;
  const T* x = static_cast<const T*>(a.x) + b * a.x_strides[0] + t * a.x_strides[1];
  T* y = static_cast<T*>(a.y) + b * a.y_strides[0] + t * a.y_strides[1];
  const float *cos = a.cos + b * a.table_stride + t * a.half, *sin = a.sin + b * a.table_stride + t * a.half;
  const int packs = static_cast<int>((a.half + N - 1) / N), work = static_cast<int>(a.heads) * packs;
  for (int unit = member.rank; unit < work; unit += member.size) {
    const int64_t head = unit / packs, i = static_cast<int64_t>(unit % packs) * N, n = a.half - i;
    const T* from = x + head * a.x_strides[2] + i;
    T* to = y + head * a.y_strides[2] + i;
    Floats<N> first = read<N>(from, n), second = read<N>(from + a.half, n);
    const Floats<N> c = read<N>(cos + i, n), s = read<N>(sin + i, n);
#pragma unroll
    for (int k = 0; k < N; ++k) turn(first.at[k], second.at[k], c.at[k], a.inverse ? -s.at[k] : s.at[k]);
    write<N>(to, n, first);
    write<N>(to + a.half, n, second);
  }
  if (y == x) return;
  const int rest = static_cast<int>(a.width - 2 * a.half), others = static_cast<int>(a.heads) * rest;
  for (int unit = member.rank; unit < others; unit += member.size) {
    const int64_t head = unit / rest, i = 2 * a.half + unit % rest;
    y[head * a.y_strides[2] + i] = x[head * a.x_strides[2] + i];
  }
}

}  // namespace

void rotary(const Rotary& a, Stream stream) {
  MEGALM_DISPATCH(a.dtype, T,
                  launch_rows(rotary_kernel<T>, a.batch * a.length, a.heads * a.half, kPack<T>, stream, a));
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
