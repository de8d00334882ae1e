#include "cpu.h"

#include "optimizer.h"

namespace megalm {
inline namespace MEGALM_ISA {
namespace {

template <class G, class M>
void adamw_range(const AdamW& a, const AdamWTensor& x, int64_t start, int64_t stop) {
  const G* grad = static_cast<const G*>(x.grad) + start;
  M* model = x.model ? static_cast<M*>(x.model) + start : nullptr;
  float *master = x.master + start, *first = x.first + start, *second = x.second + start;
  for_lanes(stop - start, [&](int64_t i, int n) {
    Vec m = load(first + i, n), v = load(second + i, n);
    const Vec weight = adamw(a, load(master + i, n), load(grad + i, n), m, v);
    store(master + i, weight, n);
    store(first + i, m, n);
    store(second + i, v, n);
    if (model) store(model + i, weight, n);
  });
}

template <class T>
double square_sum_block(const T* x, int64_t size) {
  double total = 0;
  for (int64_t start = 0; start < size; start += 1024) {  // float32 sums stay short
    Vec squares{};
    for_lanes(size - start < 1024 ? size - start : 1024, [&](int64_t i, int n) {
      const Vec value = load(x + start + i, n);
      squares += value * value;
    });
    total += sum(squares);
  }
  return total;
}

void square_sum(const SquareSumTensor& a) {
  parallel_for((a.size + kSquareBlock - 1) / kSquareBlock, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t start = block * kSquareBlock, rest = a.size - start;
      MEGALM_DISPATCH(a.dtype, T,
                      a.partial[block] = square_sum_block(static_cast<const T*>(a.x) + start,
                                                          rest < kSquareBlock ? rest : kSquareBlock));
    }
  });
}

void scale(const ScaleTensor& a, float factor) {
  parallel_for(a.size, 65536, [&](int64_t start, int64_t stop) {
    MEGALM_DISPATCH(a.dtype, T, {
      T* x = static_cast<T*>(a.x) + start;
      for_lanes(stop - start, [&](int64_t i, int n) { store(x + i, load(x + i, n) * factor, n); });
    });
  });
}

}  // namespace

void adamw_step(const AdamW& a) {
  for (int64_t t = 0; t < a.count; ++t) {
    const AdamWTensor& x = a.tensors[t];
    parallel_for(x.size, 65536, [&](int64_t start, int64_t stop) {
      MEGALM_DISPATCH(x.grad_dtype, G, MEGALM_DISPATCH(x.model_dtype, M, (adamw_range<G, M>(a, x, start, stop))));
    });
  }
}

void square_sum(const SquareSum& a) {
  for (int64_t t = 0; t < a.count; ++t) square_sum(a.tensors[t]);
}

void scale(const Scale& a) {
  for (int64_t t = 0; t < a.count; ++t) scale(a.tensors[t], a.factor);
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
