#include "dispatch.h"

#include "optimizer.h"

namespace megalm {
namespace {

void check_list_entry(const Tensor& on, const Tensor& x, int64_t size, const char* what) {
  MEGALM_CHECK(x.numel() == size && x.is_contiguous() && same_device(on, x), what,
               " must be contiguous, on one device and of equal sizes");
}

constexpr float narrow(double x) { return static_cast<float>(x); }

void adamw_in_place(const std::vector<Tensor>& masters, const std::vector<Tensor>& first,
                    const std::vector<Tensor>& second, const std::vector<Tensor>& grads,
                    const std::vector<Tensor>& models, double factor, double lr, double beta1, double beta2,
                    double epsilon, double weight_decay, int64_t step) {
  const size_t count = masters.size();
  MEGALM_CHECK(first.size() == count && second.size() == count && grads.size() == count &&
                   (models.empty() || models.size() == count),
               "AdamW needs lists of equal length");
  if (count == 0) return;
  std::vector<AdamWTensor> tensors;
  for (size_t i = 0; i < count; ++i) {
    const int64_t size = masters[i].numel();
    for (const Tensor& x : {masters[i], first[i], second[i]}) {
      MEGALM_CHECK(x.scalar_type() == ScalarType::Float, "masters and moments must be float32");
      check_list_entry(masters[0], x, size, "masters and moments");
    }
    check_list_entry(masters[0], grads[i], size, "gradients");
    if (!models.empty()) check_list_entry(masters[0], models[i], size, "model weights");
    tensors.push_back({floats(masters[i]), floats(first[i]), floats(second[i]), grads[i].const_data_ptr(),
                       models.empty() ? nullptr : models[i].mutable_data_ptr(), size, dtype_of(grads[i]),
                       models.empty() ? Dtype::kFloat32 : dtype_of(models[i])});
  }
  const double correction1 = 1 - std::pow(beta1, step), correction2 = 1 - std::pow(beta2, step);
  const AdamW arguments{tensors.data(), static_cast<int64_t>(count), narrow(factor), narrow(1 - lr * weight_decay),
                        narrow(1 - beta1), narrow(beta2), narrow(1 - beta2), narrow(lr / correction1),
                        narrow(std::sqrt(correction2)), narrow(epsilon)};
  run::adamw_step(masters[0], arguments);
}

Tensor square_sum(const std::vector<Tensor>& tensors) {
  MEGALM_CHECK(!tensors.empty(), "the sum of squares needs at least one tensor");
  Shape first{0};
  for (const Tensor& x : tensors) first.push_back(first.back() + (x.numel() + kSquareBlock - 1) / kSquareBlock);
  const Tensor partial = empty(tensors[0], {first.back()}, ScalarType::Double);
  double* sums = static_cast<double*>(partial.mutable_data_ptr());
  std::vector<SquareSumTensor> parts;
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_list_entry(tensors[0], tensors[i], tensors[i].numel(), "tensors");
    parts.push_back({tensors[i].const_data_ptr(), sums + first[i], tensors[i].numel(), dtype_of(tensors[i])});
  }
  run::square_sum(tensors[0], SquareSum{parts.data(), static_cast<int64_t>(parts.size())});
  return torch::stable::sum(partial, std::nullopt, false, ScalarType::Double);
}

}  // namespace

MEGALM_SCHEMA(m) {
  m.def("adamw_(Tensor(a!)[] masters, Tensor(b!)[] first, Tensor(c!)[] second, Tensor[] grads, Tensor(d!)[] models,"
        " float factor, float lr, float beta1, float beta2, float epsilon, float weight_decay, int step) -> ()");
  m.def("square_sum(Tensor[] tensors) -> Tensor");
}

MEGALM_IMPLEMENT(optimizer, m) {
  m.impl("adamw_", TORCH_BOX(&adamw_in_place));
  m.impl("square_sum", TORCH_BOX(&square_sum));
}

}  // namespace megalm
