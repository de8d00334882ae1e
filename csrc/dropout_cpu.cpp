#include "cpu.h"

#include "dropout.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

// Scales of elements first .. first + n, 0 or 1 / (1 - p): element e takes number e % 4 of Philox counter e / 4.
Vec mask(const BiasDropoutAdd& a, int64_t first, int n) {
  const uint32_t bound = drop_below(a.probability);
  const float keep = 1.0f / (1.0f - a.probability);
  float scales[kLanes + 4];
  uint32_t numbers[4];
  for (int64_t element = first & ~int64_t{3}; element < first + n; element += 4) {
    philox(*a.seed, element >> 2, numbers);
    for (int j = 0; j < 4; ++j) {
      const int64_t lane = element + j - first;
      if (lane >= 0 && lane < kLanes) scales[lane] = numbers[j] < bound ? 0.0f : keep;
    }
  }
  return load(scales, n);
}

template <class T>
void add_row(const BiasDropoutAdd& a, int64_t row) {
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  const T* residual = static_cast<const T*>(a.residual);
  if (residual) residual += row * a.residual_stride;
  T* y = static_cast<T*>(a.y) + row * a.cols;
  const int64_t start = mask_start(a, row);
  for_lanes(a.cols, [&](int64_t i, int n) {
    Vec value = load(x + i, n);
    if (a.bias) value += load(a.bias + i, n);
    if (a.probability > 0) value *= mask(a, start + i, n);
    if (residual) value += load(residual + i, n);
    store(y + i, value, n);
  });
}

}  // namespace

void bias_dropout_add(const BiasDropoutAdd& a) {
  parallel_for(a.rows, grain_rows(a.cols), [&](int64_t start, int64_t stop) {
    for (int64_t row = start; row < stop; ++row) MEGALM_DISPATCH(a.dtype, T, add_row<T>(a, row));
  });
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
