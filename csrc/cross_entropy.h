// Cross entropy over rows of logits, which may be one rank's range of the vocabulary.
#pragma once
#include "common.h"

namespace megalm {

struct CrossEntropyForward {
  const void* logits;  // (rows, .) with row stride; columns 0..cols count
  const int64_t* labels;  // (rows), global token ids
  float *max, *sum, *target;  // (rows): largest logit, sum of exp(logit - max), logit of the label or 0
  int64_t rows, cols, stride, start;  // column j is token start + j
  bool whole;  // all of the vocabulary is here: a label outside is an error (CUDA: NaN for its logit)
  Dtype dtype;
};

struct CrossEntropyBackward {
  const void* logits;
  const int64_t* labels;
  const float *logsumexp, *scale;  // (rows): over the whole vocabulary; incoming gradient
  void* grad;  // (rows, width); may be the logits
  int64_t rows, cols, width, stride, grad_stride, start;  // columns cols..width are padding: gradient 0
  Dtype dtype;
};

MEGALM_KERNEL(cross_entropy_forward, CrossEntropyForward)
MEGALM_KERNEL(cross_entropy_backward, CrossEntropyBackward)

inline namespace MEGALM_ISA {

// d(loss)/d(logit) without the label's -1: softmax times the incoming gradient.
template <class F>
MEGALM_HD F cross_entropy_grad(F logit, float logsumexp, float scale) {
  return exp_(logit - logsumexp) * scale;
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
