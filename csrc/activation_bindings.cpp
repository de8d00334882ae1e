#include "dispatch.h"

#include "activation.h"

namespace megalm {
namespace {

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  check_same(gate, up, "gate and up");
  const Rows g(gate), u(up);
  const Tensor y = empty(gate, shape_of(gate));
  const SwiGLU arguments{g.data(), u.data(), nullptr, y.mutable_data_ptr(), nullptr, nullptr, g.rows, g.cols, g.stride,
                         u.stride, 0, dtype_of(gate)};
  run::swiglu(gate, arguments);
  return y;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  check_same(gate, up, "gate and up");
  check_same(gate, grad, "gate and gradient");
  const Rows g(gate), u(up), d(grad);
  const Tensor grad_gate = empty(gate, shape_of(gate)), grad_up = empty(gate, shape_of(gate));
  if (g.rows * g.cols == 0) return {grad_gate, grad_up};
  const SwiGLU arguments{g.data(), u.data(), d.data(), nullptr, grad_gate.mutable_data_ptr(),
                         grad_up.mutable_data_ptr(), g.rows, g.cols, g.stride, u.stride, d.stride, dtype_of(gate)};
  run::swiglu(gate, arguments);
  return {grad_gate, grad_up};
}

Activation kind_of(int64_t kind) {
  MEGALM_CHECK(kind >= 0 && kind <= 2, "unknown activation ", kind);
  return static_cast<Activation>(kind);
}

Tensor activation(const Tensor& x, int64_t kind) {
  const Rows rows(x);
  const Tensor y = empty(x, shape_of(x));
  const Elementwise arguments{rows.data(), nullptr, y.mutable_data_ptr(), rows.rows, rows.cols, rows.stride, 0,
                              kind_of(kind), dtype_of(x)};
  run::activation(x, arguments);
  return y;
}

Tensor activation_backward(const Tensor& grad, const Tensor& x, int64_t kind) {
  check_same(grad, x, "gradient and input");
  const Rows g(grad), rows(x);
  const Tensor grad_x = empty(x, shape_of(x));
  if (rows.rows * rows.cols == 0) return grad_x;
  const Elementwise arguments{rows.data(), g.data(), grad_x.mutable_data_ptr(), rows.rows, rows.cols, rows.stride,
                              g.stride, kind_of(kind), dtype_of(x)};
  run::activation(x, arguments);
  return grad_x;
}

}  // namespace

MEGALM_SCHEMA(m) {
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor grad_gate, Tensor grad_up)");
  m.def("activation(Tensor x, int kind) -> Tensor");
  m.def("activation_backward(Tensor grad, Tensor x, int kind) -> Tensor");
}

MEGALM_IMPLEMENT(activation, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
  m.impl("activation", TORCH_BOX(&activation));
  m.impl("activation_backward", TORCH_BOX(&activation_backward));
}

}  // namespace megalm
