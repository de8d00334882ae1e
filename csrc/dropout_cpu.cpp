#include "cpu.h"

#include "dropout.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

constexpr int kDropoutBlock = 256;  // elements whose scales are drawn before they are used

// Numbers of the Philox counters from `counter` on, in order: number j of counter c at 4 (c - counter) + j.
void draw(int64_t seed, int64_t counter, uint32_t numbers[4 * kLanes]) {
  uint32_t halves[2][kLanes], drawn[4][kLanes];
  for (int i = 0; i < kLanes; ++i) {
    halves[0][i] = static_cast<uint32_t>(counter + i);
    halves[1][i] = static_cast<uint32_t>((counter + i) >> 32);
  }
  VecUint low, high, out[4];
  memcpy(&low, halves[0], sizeof low);
  memcpy(&high, halves[1], sizeof high);
  philox(seed, low, high, out);
  memcpy(drawn, out, sizeof drawn);
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < 4; ++j) numbers[4 * i + j] = drawn[j][i];
  }
}

// Scales of elements first .. first + count, 0 or 1 / (1 - p): element e takes number e % 4 of Philox counter e / 4.
void mask(const DropoutAdd& a, int64_t first, int64_t count, float* scales) {
  const uint32_t bound = drop_below(a.probability);
  const float keep = 1.0f / (1.0f - a.probability);
  uint32_t numbers[4 * kLanes];
  for (int64_t element = first & ~int64_t{3}; element < first + count; element += 4 * kLanes) {
    draw(*a.seed, element >> 2, numbers);
    const int64_t skip = element < first ? first - element : 0, end = first + count - element;
    float* out = scales + (element - first);
    for (int64_t i = skip; i < 4 * kLanes && i < end; ++i) out[i] = numbers[i] < bound ? 0.0f : keep;
  }
}

template <class T>
void add_block(const DropoutAdd& a, const T* x, const T* residual, const float* scales, T* y, int64_t size) {
  for_lanes(size, [&](int64_t i, int n) {
    Vec value = load(x + i, n);
    if (a.probability > 0) value *= load(scales + i, n);
    if (residual) value += load(residual + i, n);
    store(y + i, value, n);
  });
}

template <class T>
void add_row(const DropoutAdd& a, int64_t row) {
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  const T* residual = static_cast<const T*>(a.residual);
  if (residual) residual += row * a.residual_stride;
  T* y = static_cast<T*>(a.y) + row * a.cols;
  const int64_t start = mask_start(a, row);
  float scales[kDropoutBlock];
  for (int64_t i = 0; i < a.cols; i += kDropoutBlock) {
    const int64_t size = a.cols - i < kDropoutBlock ? a.cols - i : kDropoutBlock;
    if (a.probability > 0) mask(a, start + i, size, scales);
    add_block(a, x + i, residual ? residual + i : nullptr, scales, y + i, size);
  }
}

}  // namespace

void dropout_add(const DropoutAdd& a) {
  parallel_for(a.rows, grain_rows(a.cols), [&](int64_t start, int64_t stop) {
    for (int64_t row = start; row < stop; ++row) MEGALM_DISPATCH(a.dtype, T, add_row<T>(a, row));
  });
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
