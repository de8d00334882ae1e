// AdamW on float32 master weights, and the sums of squares that gradient clipping needs. Both take lists of
// tensors, which lie on the host.
#pragma once
#include "common.h"

namespace megalm {

struct AdamWTensor {
  float *master, *first, *second;  // weights and moments, float32
  const void* grad;
  void* model;  // the model's copy of the weights, rounded from the masters; null: none
  int64_t size;
  Dtype grad_dtype, model_dtype;
};

struct AdamW {
  const AdamWTensor* tensors;
  int64_t count;
  float factor;  // every gradient is multiplied by it first (loss scale, clipping)
  // Each is rounded once, from float64: 1 - 0.999 in float32 would be wrong by 1e-5 of itself.
  float keep;  // 1 - learning rate x weight decay
  float fresh1, beta2, fresh2;  // 1 - beta1, beta2, 1 - beta2
  float step_size, correction2_root;  // learning rate / (1 - beta1^t), sqrt(1 - beta2^t)
  float epsilon;
};

struct SquareSumTensor {
  const void* x;
  double* partial;  // one sum for each block of kSquareBlock elements
  int64_t size;
  Dtype dtype;
};

struct SquareSum {
  const SquareSumTensor* tensors;
  int64_t count;
};

MEGALM_KERNEL(adamw_step, AdamW)
MEGALM_KERNEL(square_sum, SquareSum)

// Elements that one partial sum covers: fixed, so that the result does not depend on the number of threads.
constexpr int64_t kSquareBlock = 65536;

inline namespace MEGALM_ISA {

// One step of AdamW (Loshchilov and Hutter 2019, algorithm 2), with torch.optim.AdamW's order of operations.
template <class F>
MEGALM_HD F adamw(const AdamW& a, F weight, F grad, F& first, F& second) {
  grad = grad * a.factor;
  first = first + (grad - first) * a.fresh1;
  second = second * a.beta2 + grad * grad * a.fresh2;
  return weight * a.keep - first * a.step_size / (sqrt_(second) / a.correction2_root + a.epsilon);
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
