#include "dispatch.h"

#include "embedding.h"

namespace megalm {
namespace {

Tensor embedding_backward(const Tensor& grad, const Tensor& ids, const Tensor& order, int64_t num_rows) {
  const Rows rows(grad);
  const Tensor sorted = checked(grad, ids, ScalarType::Long, rows.rows, "ids"),
               places = checked(grad, order, ScalarType::Long, rows.rows, "order");
  const Tensor out = empty(grad, {num_rows, rows.cols});
  const Tensor starts = empty(grad, {num_rows + 1}, ScalarType::Long);
  const EmbeddingBackward arguments{rows.data(), integers(sorted), integers(places), out.mutable_data_ptr(),
                                    static_cast<int64_t*>(starts.mutable_data_ptr()), rows.rows, num_rows, rows.cols,
                                    rows.stride, dtype_of(grad)};
  run::embedding_backward(grad, arguments);
  return out;
}

}  // namespace

MEGALM_SCHEMA(m) { m.def("embedding_backward(Tensor grad, Tensor ids, Tensor order, int rows) -> Tensor"); }

MEGALM_IMPLEMENT(embedding, m) { m.impl("embedding_backward", TORCH_BOX(&embedding_backward)); }

}  // namespace megalm
