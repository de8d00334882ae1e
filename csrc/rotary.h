// Rotary position embedding: channel i of every head turns against channel i + half (the half-split pairing).
#pragma once
#include "common.h"

namespace megalm {

struct Rotary {
  const void* x;  // (batch, length, heads, width) by strides, channels adjacent
  void* y;  // the same with its own strides
  const float *cos, *sin;  // (batch or 1, length, half), contiguous
  int64_t batch, length, heads, width, half;
  int64_t x_strides[3], y_strides[3];
  int64_t table_stride;  // 0 where the batch shares the tables
  bool inverse;  // turn back: the gradient
  Dtype dtype;
};

MEGALM_KERNEL(rotary, Rotary)

inline namespace MEGALM_ISA {

template <class F>
MEGALM_HD void turn(F& first, F& second, F cos, F sin) {
  const F turned = first * cos - second * sin;
  second = second * cos + first * sin;
  first = turned;
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
