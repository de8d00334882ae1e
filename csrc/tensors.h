// Checks and views of torch tensors for the bindings, on torch's stable interface (no other torch header).
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common.h"

namespace megalm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

#define MEGALM_CHECK(condition, ...) STD_TORCH_CHECK(condition, "megalm kernels: ", __VA_ARGS__)

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: MEGALM_CHECK(false, "the dtype must be float32, bfloat16 or float16");
  }
  return Dtype::kFloat32;
}

inline Shape shape_of(const Tensor& x) { return Shape(x.sizes().begin(), x.sizes().end()); }

inline Tensor empty(const Tensor& like, const Shape& shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
}
inline Tensor empty(const Tensor& like, const Shape& shape) { return empty(like, shape, like.scalar_type()); }

inline float* floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

inline const int64_t* integers(const Tensor& x) { return static_cast<const int64_t*>(x.const_data_ptr()); }

inline Tensor packed(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && (!a.is_cuda() || a.get_device_index() == b.get_device_index());
}

inline void check_same(const Tensor& a, const Tensor& b, const char* what) {
  MEGALM_CHECK(shape_of(a) == shape_of(b) && a.scalar_type() == b.scalar_type() && same_device(a, b), what,
               " must have equal shape, dtype and device");
}

// A contiguous tensor of the given type and number of elements, where `on` lives.
inline Tensor checked(const Tensor& on, const Tensor& x, ScalarType type, int64_t size, const char* what) {
  MEGALM_CHECK(x.scalar_type() == type && x.numel() == size, what, " has the wrong dtype or number of elements");
  MEGALM_CHECK(same_device(on, x), what, " must be on the device of the input");
  return packed(x);
}

// A tensor as rows of its last dim, one stride apart; a copy where its strides do not allow that.
struct Rows {
  Tensor tensor;
  int64_t rows, cols, stride;

  explicit Rows(const Tensor& x) : tensor(x) {
    const int64_t dims = x.dim();
    MEGALM_CHECK(dims >= 1, "a tensor needs at least one dim");
    cols = x.size(dims - 1);
    rows = 1;
    for (int64_t d = 0; d < dims - 1; ++d) rows *= x.size(d);
    if (!regular(x)) tensor = torch::stable::contiguous(x);
    stride = cols;
    for (int64_t d = dims - 2; d >= 0; --d) {
      if (tensor.size(d) > 1) {
        stride = tensor.stride(d);
        break;
      }
    }
  }

  const void* data() const { return tensor.const_data_ptr(); }

 private:
  static bool regular(const Tensor& x) {
    const int64_t dims = x.dim();
    if (x.size(dims - 1) > 1 && x.stride(dims - 1) != 1) return false;
    int64_t expected = -1;
    for (int64_t d = dims - 2; d >= 0; --d) {
      if (x.size(d) == 1) continue;
      if (expected >= 0 && x.stride(d) != expected) return false;
      expected = x.stride(d) * x.size(d);
    }
    return true;
  }
};

// Parts whose sums over rows are kept apart: fixed, so that results do not depend on the number of threads. On GPUs the
// most there can be: a kernel takes as many as run at once.
inline int64_t num_chunks(const Tensor& x, int64_t rows) { return std::min<int64_t>(rows, x.is_cuda() ? 1024 : 32); }

}  // namespace megalm
