// residual + dropout(x + bias), each term optional but x. The mask is drawn again in the backward from the seed, never stored.
#pragma once
#include "common.h"

namespace megalm {

struct BiasDropoutAdd {
  const void* x;  // (rows, cols) by row stride: the branch, or in the backward the gradient of the result
  const float* bias;  // (cols), or null
  const void* residual;  // or null, as in the backward
  void* y;  // contiguous
  const int64_t* seed;  // one number, on the device
  float probability;
  int64_t rows, cols, x_stride, residual_stride;
  // Rows come in runs, `run_stride` rows of a larger tensor apart, from its row `first` on: the mask is that tensor's.
  int64_t run, run_stride, first;
  Dtype dtype;
};

inline namespace MEGALM_ISA {

// One of Philox's ten rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", table 2).
MEGALM_HD void philox_round(uint32_t c[4], uint32_t key0, uint32_t key1) {
  const uint64_t a = static_cast<uint64_t>(c[0]) * 0xD2511F53u, b = static_cast<uint64_t>(c[2]) * 0xCD9E8D57u;
  const uint32_t c1 = c[1], c3 = c[3];
  c[0] = static_cast<uint32_t>(b >> 32) ^ c1 ^ key0;
  c[1] = static_cast<uint32_t>(b);
  c[2] = static_cast<uint32_t>(a >> 32) ^ c3 ^ key1;
  c[3] = static_cast<uint32_t>(a);
}

// Four 32-bit numbers of counter `group`, whose 64-bit key is `seed`.
MEGALM_HD void philox(int64_t seed, int64_t group, uint32_t out[4]) {
  out[0] = static_cast<uint32_t>(group);
  out[1] = static_cast<uint32_t>(group >> 32);
  out[2] = out[3] = 0;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    philox_round(out, key0, key1);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// Number of the first element of a row in the tensor whose mask it is.
MEGALM_HD int64_t mask_start(const BiasDropoutAdd& a, int64_t row) {
  return (a.first + row / a.run * a.run_stride + row % a.run) * a.cols;
}

// Numbers below this are dropped.
MEGALM_HD uint32_t drop_below(float probability) { return static_cast<uint32_t>(probability * 4294967295.0); }

}  // inline namespace MEGALM_ISA
}  // namespace megalm
