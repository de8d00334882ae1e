#include "cuda.h"

#include "rotary.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

constexpr int kHeads = 4;  // heads that a thread turns with the cosines and sines that it has read

// One team a token; a thread turns one pack of pairs in one head after the other.
template <class T, int N>
__global__ void __launch_bounds__(kMaxThreads) rotary_kernel(Rotary a, int threads) {
  const Member member(threads);
  const unsigned row = member.row(), length = static_cast<unsigned>(a.length);
  const int64_t b = row / length, t = row % length;
  if (b >= a.batch) return;
  const T* x = static_cast<const T*>(a.x) + b * a.x_strides[0] + t * a.x_strides[1];
  T* y = static_cast<T*>(a.y) + b * a.y_strides[0] + t * a.y_strides[1];
  const float *cos = a.cos + b * a.table_stride + t * a.half, *sin = a.sin + b * a.table_stride + t * a.half;
  const int half = static_cast<int>(a.half), packs = half / N, heads = static_cast<int>(a.heads);
  Floats<N> c{}, s{};
  int at = -1;
  for (int unit = member.rank; unit < heads * packs; unit += member.size) {
    const int head = unit / packs, i = unit % packs * N;
    const T* from = x + head * a.x_strides[2] + i;
    T* to = y + head * a.y_strides[2] + i;
    const Raw<N, T> raw_first = load_raw<N>(from), raw_second = load_raw<N>(from + half);
    if (i != at) {
      c = load<N>(cos + i);
      s = load<N>(sin + i);
      at = i;
    }
    Floats<N> first = floats(raw_first), second = floats(raw_second);
#pragma unroll
    for (int k = 0; k < N; ++k) turn(first.at[k], second.at[k], c.at[k], a.inverse ? -s.at[k] : s.at[k]);
    store(to, first);
    store(to + half, second);
  }
  const int rest = static_cast<int>(a.width) - 2 * half, others = heads * rest;
  for (int unit = member.rank; unit < others; unit += member.size) {
    const int64_t head = unit / rest, i = 2 * half + unit % rest;
    y[head * a.y_strides[2] + i] = x[head * a.x_strides[2] + i];
  }
}

}  // namespace

void rotary(const Rotary& a, Stream stream) {
  const int64_t rows = a.batch * a.length, pairs = a.heads * a.half;
  MEGALM_DISPATCH(a.dtype, T, {
    const auto& [xb, xt, xh] = a.x_strides;
    const auto& [yb, yt, yh] = a.y_strides;
    if (aligned<T>({a.x, a.y, a.cos, a.sin}, {a.half, xb, xt, xh, yb, yt, yh})) {
      launch_rows(rotary_kernel<T, kPack<T>>, rows, pairs, kPack<T> * kHeads, stream, a);
    } else {
      launch_rows(rotary_kernel<T, 1>, rows, pairs, kHeads, stream, a);
    }
  });
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
