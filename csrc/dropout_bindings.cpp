#include "dispatch.h"

#include "dropout.h"

namespace megalm {
namespace {

Tensor dropout_add(const Tensor& x, const OptionalTensor& residual, const Tensor& seed, double probability, int64_t run,
                   int64_t run_stride, int64_t first) {
  MEGALM_CHECK(probability >= 0 && probability < 1, "dropout probability ", probability, " must lie in [0, 1)");
  MEGALM_CHECK(run > 0 && run_stride >= 0 && first >= 0, "the rows of a mask come in runs of at least 1");
  if (residual) check_same(x, *residual, "input and residual");
  const Rows rows(x), other(residual ? *residual : x);
  const Tensor s = checked(x, seed, ScalarType::Long, 1, "seed");
  const Tensor y = empty(x, shape_of(x));
  const DropoutAdd arguments{rows.data(), residual ? other.data() : nullptr, y.mutable_data_ptr(), integers(s),
                             static_cast<float>(probability), rows.rows, rows.cols, rows.stride, other.stride, run,
                             run_stride, first, dtype_of(x)};
  run::dropout_add(x, arguments);
  return y;
}

}  // namespace

MEGALM_SCHEMA(m) {
  m.def("dropout_add(Tensor x, Tensor? residual, Tensor seed, float probability, int run, int run_stride, int first)"
        " -> Tensor");
}

MEGALM_IMPLEMENT(dropout, m) { m.impl("dropout_add", TORCH_BOX(&dropout_add)); }

}  // namespace megalm
