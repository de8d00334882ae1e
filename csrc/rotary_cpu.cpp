#include "cpu.h"

#include "rotary.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

template <class T>
void rotate_head(const Rotary& a, const T* x, T* y, const float* cos, const float* sin) {
  for_lanes(a.half, [&](int64_t i, int n) {
    Vec first = load(x + i, n), second = load(x + a.half + i, n), angle_sin = load(sin + i, n);
    turn(first, second, load(cos + i, n), a.inverse ? -angle_sin : angle_sin);
    store(y + i, first, n);
    store(y + a.half + i, second, n);
  });
  if (2 * a.half < a.width) memcpy(y + 2 * a.half, x + 2 * a.half, (a.width - 2 * a.half) * sizeof(T));
}

template <class T>
void rotate_token(const Rotary& a, int64_t token) {
  const int64_t b = token / a.length, t = token % a.length;
  const T* x = static_cast<const T*>(a.x) + b * a.x_strides[0] + t * a.x_strides[1];
  T* y = static_cast<T*>(a.y) + b * a.y_strides[0] + t * a.y_strides[1];
  const int64_t table = b * a.table_stride + t * a.half;
  for (int64_t h = 0; h < a.heads; ++h) {
    rotate_head(a, x + h * a.x_strides[2], y + h * a.y_strides[2], a.cos + table, a.sin + table);
  }
}

}  // namespace

void rotary(const Rotary& a) {
  parallel_for(a.batch * a.length, grain_rows(a.heads * a.width), [&](int64_t start, int64_t stop) {
    for (int64_t token = start; token < stop; ++token) MEGALM_DISPATCH(a.dtype, T, rotate_token<T>(a, token));
  });
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
