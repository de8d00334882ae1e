// Softmax of scaled attention scores whose keys may be hidden: by causality, by document, by a mask.
#pragma once
#include "common.h"

namespace megalm {

struct Softmax {
  const void* scores;  // (batch, heads, queries, keys), contiguous
  const bool* visible;  // by strides of (batch, heads, queries), keys adjacent; or null
  const int64_t *query_documents, *key_documents;  // (batch, queries), (batch, keys): only equal ones see; or null
  void* y;  // contiguous
  int64_t batch, heads, queries, keys;
  int64_t visible_strides[3];
  float scale;
  bool causal;  // query t sees the keys up to t + keys - queries
  Dtype dtype;
};

struct SoftmaxBackward {
  const void *grad, *y;  // (rows, cols), contiguous
  void* grad_scores;
  int64_t rows, cols;
  float scale;
  Dtype dtype;
};

inline namespace MEGALM_ISA {

// Number of keys that causality leaves to a query.
MEGALM_HD int64_t keys_seen(const Softmax& a, int64_t query) {
  const int64_t seen = a.causal ? query + a.keys - a.queries + 1 : a.keys;
  return seen < 0 ? 0 : seen;
}

// Whether mask and documents let a query see a key.
MEGALM_HD bool sees(const Softmax& a, int64_t batch, int64_t head, int64_t query, int64_t key) {
  if (a.visible) {
    const int64_t* strides = a.visible_strides;
    if (!a.visible[batch * strides[0] + head * strides[1] + query * strides[2] + key]) return false;
  }
  return !a.query_documents ||
         a.query_documents[batch * a.queries + query] == a.key_documents[batch * a.keys + key];
}

// d(score) = scale y (g - sum(g y))
template <class F>
MEGALM_HD F softmax_grad(F grad, F y, float sum_grad_y, float scale) {
  return (grad - sum_grad_y) * y * scale;
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
