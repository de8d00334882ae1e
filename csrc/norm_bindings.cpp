#include "dispatch.h"

#include "norm.h"

namespace megalm {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> norm(const Tensor& x, const OptionalTensor& residual, const Tensor& weight,
                                                const OptionalTensor& bias, double epsilon) {
  const bool center = bias.has_value();
  const Rows rows(x), other(residual ? *residual : x);
  if (residual) check_same(x, *residual, "input and residual");
  const Tensor w = checked(x, weight, ScalarType::Float, rows.cols, "weight"),
               b = bias ? checked(x, *bias, ScalarType::Float, rows.cols, "bias") : w;
  const Tensor y = empty(x, shape_of(x)), sum = empty(x, residual ? shape_of(x) : Shape{0});
  const Tensor mean = empty(x, {center ? rows.rows : 0}, ScalarType::Float);
  const Tensor rstd = empty(x, {rows.rows}, ScalarType::Float);
  const NormForward arguments{
      rows.data(), residual ? other.data() : nullptr, floats(w), bias ? floats(b) : nullptr, y.mutable_data_ptr(),
      residual ? sum.mutable_data_ptr() : nullptr, center ? floats(mean) : nullptr, floats(rstd), rows.rows, rows.cols,
      rows.stride, other.stride, static_cast<float>(epsilon), center, dtype_of(x)};
  run::norm_forward(x, arguments);
  return {y, sum, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& grad, const OptionalTensor& grad_sum, const Tensor& x,
                                                 const Tensor& weight, const Tensor& mean, const Tensor& rstd,
                                                 bool center) {
  check_same(grad, x, "gradient and input");
  if (grad_sum) check_same(*grad_sum, x, "gradient and input");
  const Rows g(grad), gs(grad_sum ? *grad_sum : grad), rows(x);
  const Tensor w = checked(x, weight, ScalarType::Float, rows.cols, "weight");
  const Tensor means = checked(x, mean, ScalarType::Float, center ? rows.rows : 0, "mean"),
               rstds = checked(x, rstd, ScalarType::Float, rows.rows, "rstd");
  const int64_t chunks = num_chunks(x, rows.rows);
  const Tensor grad_x = empty(x, shape_of(x)), grad_weight = empty(x, {rows.cols}, ScalarType::Float);
  const Tensor grad_bias = empty(x, {center ? rows.cols : 0}, ScalarType::Float);
  const Tensor partial = empty(x, {center ? 2 : 1, chunks, rows.cols}, ScalarType::Float);
  const NormBackward arguments{
      g.data(), grad_sum ? gs.data() : nullptr, rows.data(), floats(w), floats(means), floats(rstds),
      grad_x.mutable_data_ptr(), floats(partial), center ? floats(partial) + chunks * rows.cols : nullptr,
      floats(grad_weight), center ? floats(grad_bias) : nullptr, rows.rows, rows.cols, chunks, g.stride, gs.stride,
      rows.stride, center, dtype_of(x)};
  run::norm_backward(x, arguments);
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

MEGALM_SCHEMA(m) {  // with a bias LayerNorm, without RMSNorm
  m.def("norm(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float epsilon)"
        " -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)");
  m.def("norm_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool center)"
        " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
}

MEGALM_IMPLEMENT(norm, m) {
  m.impl("norm", TORCH_BOX(&norm));
  m.impl("norm_backward", TORCH_BOX(&norm_backward));
}

}  // namespace megalm
