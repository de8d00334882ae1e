#include "dispatch.h"

#include "cross_entropy.h"

namespace megalm {
namespace {

void check_labels(const Tensor& labels, int64_t num_classes) {
  const int64_t* ids = integers(labels);
  for (int64_t i = 0; i < labels.numel(); ++i) {
    MEGALM_CHECK(ids[i] >= 0 && ids[i] < num_classes, "label ", ids[i], " must lie in [0, ", num_classes, ")");
  }
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& labels, int64_t start,
                                                 int64_t num_classes, bool whole) {
  MEGALM_CHECK(logits.dim() == 2 && num_classes >= 0 && num_classes <= logits.size(1),
               "logits must be (N, V), V at least ", num_classes);
  const Rows rows(logits);
  const Tensor ids = checked(logits, labels, ScalarType::Long, rows.rows, "labels");
  if (whole && !ids.is_cuda()) check_labels(ids, num_classes);
  const Tensor max = empty(logits, {rows.rows}, ScalarType::Float), sum = empty(logits, {rows.rows}, ScalarType::Float);
  const Tensor target = empty(logits, {rows.rows}, ScalarType::Float);
  const CrossEntropyForward arguments{rows.data(), integers(ids), floats(max), floats(sum), floats(target), rows.rows,
                                      num_classes, rows.stride, start, whole, dtype_of(logits)};
  run::cross_entropy_forward(logits, arguments);
  return {max, sum, target};
}

void gradient_into(const Rows& rows, const Tensor& grad, int64_t grad_stride, const Tensor& labels,
                   const Tensor& logsumexp, const Tensor& scale, int64_t start, int64_t num_classes) {
  MEGALM_CHECK(num_classes >= 0 && num_classes <= rows.cols, "num_classes must not exceed the logits' width");
  const Tensor ids = checked(grad, labels, ScalarType::Long, rows.rows, "labels"),
               lse = checked(grad, logsumexp, ScalarType::Float, rows.rows, "logsumexp"),
               scales = checked(grad, scale, ScalarType::Float, rows.rows, "scale");
  const CrossEntropyBackward arguments{rows.data(), integers(ids), floats(lse), floats(scales), grad.mutable_data_ptr(),
                                       rows.rows, num_classes, rows.cols, rows.stride, grad_stride, start,
                                       dtype_of(grad)};
  run::cross_entropy_backward(grad, arguments);
}

Tensor cross_entropy_backward(const Tensor& logits, const Tensor& labels, const Tensor& logsumexp, const Tensor& scale,
                              int64_t start, int64_t num_classes) {
  const Tensor grad = empty(logits, shape_of(logits));
  const Rows rows(logits);
  gradient_into(rows, grad, rows.cols, labels, logsumexp, scale, start, num_classes);
  return grad;
}

void cross_entropy_backward_in_place(const Tensor& logits, const Tensor& labels, const Tensor& logsumexp,
                                     const Tensor& scale, int64_t start, int64_t num_classes) {
  MEGALM_CHECK(logits.dim() == 2 && (logits.size(1) <= 1 || logits.stride(1) == 1),
               "the gradient in place needs logits (N, V) whose columns are adjacent");
  const Rows rows(logits);
  gradient_into(rows, logits, rows.stride, labels, logsumexp, scale, start, num_classes);
}

}  // namespace

MEGALM_SCHEMA(m) {
  m.def("cross_entropy(Tensor logits, Tensor labels, int start, int num_classes, bool whole)"
        " -> (Tensor max, Tensor sum, Tensor target)");
  m.def("cross_entropy_backward(Tensor logits, Tensor labels, Tensor logsumexp, Tensor scale, int start,"
        " int num_classes) -> Tensor");
  m.def("cross_entropy_backward_(Tensor(a!) logits, Tensor labels, Tensor logsumexp, Tensor scale, int start,"
        " int num_classes) -> ()");
}

MEGALM_IMPLEMENT(cross_entropy, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
  m.impl("cross_entropy_backward_", TORCH_BOX(&cross_entropy_backward_in_place));
}

}  // namespace megalm
