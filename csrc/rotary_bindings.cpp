#include "dispatch.h"

#include "rotary.h"

namespace megalm {
namespace {

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  MEGALM_CHECK(x.dim() == 4 && cos.dim() == 3, "rotary needs (B, T, H, C) and tables (B or 1, T, R/2)");
  const Tensor input = x.size(3) > 1 && x.stride(3) != 1 ? torch::stable::contiguous(x) : x;
  const int64_t batch = x.size(0), length = x.size(1), half = cos.size(2);
  MEGALM_CHECK(shape_of(cos) == shape_of(sin) && cos.size(1) == length && 2 * half <= x.size(3) &&
                   (cos.size(0) == batch || cos.size(0) == 1),
               "rotary tables do not fit the input");
  const Tensor c = checked(x, cos, ScalarType::Float, cos.numel(), "cosines"),
               s = checked(x, sin, ScalarType::Float, cos.numel(), "sines");
  const Tensor y = empty(x, shape_of(x));
  const Rotary arguments{input.const_data_ptr(), y.mutable_data_ptr(), floats(c), floats(s), batch, length, x.size(2),
                         x.size(3), half, {input.stride(0), input.stride(1), input.stride(2)},
                         {y.stride(0), y.stride(1), y.stride(2)}, cos.size(0) == 1 ? 0 : length * half, inverse,
                         dtype_of(x)};
  run::rotary(x, arguments);
  return y;
}

}  // namespace

MEGALM_SCHEMA(m) { m.def("rotary(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor"); }

MEGALM_IMPLEMENT(rotary, m) { m.impl("rotary", TORCH_BOX(&rotary)); }

}  // namespace megalm
