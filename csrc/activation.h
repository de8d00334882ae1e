// Activations of the MLP with their derivatives, and SwiGLU.
#pragma once
#include "common.h"

namespace megalm {

enum class Activation : int32_t { kGelu, kGeluTanh, kSquaredRelu };

struct SwiGLU {  // y = silu(gate) up
  const void *gate, *up, *grad;  // (rows, cols) by row strides; grad is null in the forward
  void *y, *grad_gate, *grad_up;  // contiguous
  int64_t rows, cols, gate_stride, up_stride, grad_stride;
  Dtype dtype;
};

struct Elementwise {  // y = f(x)
  const void *x, *grad;  // (rows, cols) by row strides; grad is null in the forward
  void* y;  // contiguous: the output, or the gradient of x
  int64_t rows, cols, x_stride, grad_stride;
  Activation kind;
  Dtype dtype;
};

MEGALM_KERNEL(swiglu, SwiGLU)
MEGALM_KERNEL(activation, Elementwise)

inline namespace MEGALM_ISA {

template <class F>
MEGALM_HD F sigmoid(F x) {
  return reciprocal(exp_(-x) + 1.0f);
}

// Phi(x) within 1e-7: erfc's rational approximation (Abramowitz and Stegun 7.1.26), of the tail, not of 1 minus it.
template <class F>
MEGALM_HD F normal_cdf(F x) {
  const F t = reciprocal(abs_(x) * (0.3275911f * 0.70710678f) + 1.0f);
  F p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const F tail = p * t * exp_(x * x * -0.5f) * 0.5f;
  return x > 0.0f ? 1.0f - tail : tail;
}

template <class F>
struct ValueAndSlope {
  F value, slope;
};

// f(x) and f'(x)
template <class F>
MEGALM_HD ValueAndSlope<F> silu(F x) {
  const F s = sigmoid(x);
  return {x * s, s * (x * (1.0f - s) + 1.0f)};
}

template <Activation kind, class F>
MEGALM_HD ValueAndSlope<F> value_and_slope(F x) {
  if constexpr (kind == Activation::kGelu) {
    const F cdf = normal_cdf(x);
    return {x * cdf, cdf + x * exp_(x * x * -0.5f) * 0.39894228f};
  } else if constexpr (kind == Activation::kGeluTanh) {
    // (1 + tanh u) / 2 = sigmoid(2u)
    constexpr float scale = 2.0f * 0.79788456f;
    const F s = sigmoid((x * x * 0.044715f + 1.0f) * x * scale);
    return {x * s, s + x * s * (1.0f - s) * (x * x * (3.0f * 0.044715f) + 1.0f) * scale};
  } else {
    const F positive = max_(x, x * 0.0f);
    return {positive * positive, positive * 2.0f};
  }
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm

#define MEGALM_DISPATCH_ACTIVATION(kind, name, ...)                                                             \
  switch (kind) {                                                                                               \
    case ::megalm::Activation::kGelu: { constexpr auto name = ::megalm::Activation::kGelu; __VA_ARGS__; break; }               \
    case ::megalm::Activation::kGeluTanh: { constexpr auto name = ::megalm::Activation::kGeluTanh; __VA_ARGS__; break; }       \
    case ::megalm::Activation::kSquaredRelu: { constexpr auto name = ::megalm::Activation::kSquaredRelu; __VA_ARGS__; break; } \
  }
