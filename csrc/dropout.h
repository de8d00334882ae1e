// residual + dropout(x), the residual optional. The mask is drawn again in the backward from the seed, never stored.
#pragma once
#include "common.h"

namespace megalm {

struct DropoutAdd {
  const void* x;  // (rows, cols) by row stride: the branch, or in the backward the gradient of the result
  const void* residual;  // or null, as in the backward
  void* y;  // contiguous
  const int64_t* seed;  // one number, on the device
  float probability;
  int64_t rows, cols, x_stride, residual_stride;
  // Rows come in runs, `run_stride` rows of a larger tensor apart, from its row `first` on: the mask is that tensor's.
  int64_t run, run_stride, first;
  Dtype dtype;
};

MEGALM_KERNEL(dropout_add, DropoutAdd)

inline namespace MEGALM_ISA {

// One of Philox's ten rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", table 2).
template <class U>
MEGALM_HD void philox_round(U c[4], uint32_t key0, uint32_t key1) {
  U low0, high0, low2, high2;
  multiply(c[0], 0xD2511F53u, low0, high0);
  multiply(c[2], 0xCD9E8D57u, low2, high2);
  c[0] = high2 ^ c[1] ^ key0;
  c[1] = low2;
  c[2] = high0 ^ c[3] ^ key1;
  c[3] = low0;
}

// Four 32-bit numbers of a counter, given in halves, whose 64-bit key is `seed`; or as many vectors of them.
template <class U>
MEGALM_HD void philox(int64_t seed, U low, U high, U out[4]) {
  out[0] = low;
  out[1] = high;
  out[2] = out[3] = U{};
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    philox_round(out, key0, key1);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// Number of the first element of a row in the tensor whose mask it is.
MEGALM_HD int64_t mask_start(const DropoutAdd& a, int64_t row) {
  const int64_t run = row < a.run ? 0 : row / a.run;  // GPUs divide slowly
  return (a.first + run * a.run_stride + row - run * a.run) * a.cols;
}

// Numbers below this are dropped.
MEGALM_HD uint32_t drop_below(float probability) { return static_cast<uint32_t>(probability * 4294967295.0); }

}  // inline namespace MEGALM_ISA
}  // namespace megalm
