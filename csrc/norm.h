// LayerNorm (center) and RMSNorm of rows, with an optional residual that is added before. Statistics are float32.
#pragma once
#include "common.h"

namespace megalm {

struct NormForward {
  const void *x, *residual;  // (rows, cols); residual may be null
  const float *weight, *bias;  // (cols); bias is null for RMSNorm
  void *y, *sum;  // contiguous; sum = x + residual where there is one
  float *mean, *rstd;  // (rows); mean only if center
  int64_t rows, cols, x_stride, residual_stride;
  float epsilon;
  bool center;
  Dtype dtype;
};

struct NormBackward {
  const void *grad, *grad_sum, *x;  // grad_sum (of the residual stream) may be null; x is what was normalized
  const float *weight, *mean, *rstd;
  void* grad_x;
  float *partial_weight, *partial_bias;  // (chunks, cols) work space; bias only if center
  float *grad_weight, *grad_bias;  // (cols)
  int64_t rows, cols, chunks, grad_stride, grad_sum_stride, x_stride;
  bool center;
  Dtype dtype;
};

MEGALM_KERNEL(norm_forward, NormForward)
MEGALM_KERNEL(norm_backward, NormBackward)

inline namespace MEGALM_ISA {

template <class F>
MEGALM_HD F normalized(F x, float mean, float rstd) {
  return (x - mean) * rstd;
}

// y = xhat w + b
template <class F>
MEGALM_HD F norm_output(F x, float mean, float rstd, F weight, F bias) {
  return normalized(x, mean, rstd) * weight + bias;
}

// dx = rstd (g w - mean(g w) - xhat mean(g w xhat)); the first mean is zero for RMSNorm.
template <class F>
MEGALM_HD F norm_grad(F grad, F weight, F x, float mean, float rstd, float mean_gw, float mean_gwx) {
  return (grad * weight - mean_gw - normalized(x, mean, rstd) * mean_gwx) * rstd;
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
