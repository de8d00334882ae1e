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

}  // namespace

void adamw_step(const AdamW& a) {
  parallel_for_blocks(a.tensors, a.count, kSquareBlock, [&](int64_t t, int64_t start, int64_t stop) {
    const AdamWTensor& x = a.tensors[t];
    MEGALM_DISPATCH(x.grad_dtype, G, MEGALM_DISPATCH(x.model_dtype, M, (adamw_range<G, M>(a, x, start, stop))));
  });
}

void square_sum(const SquareSum& a) {
  parallel_for_blocks(a.tensors, a.count, kSquareBlock, [&](int64_t t, int64_t start, int64_t stop) {
    const SquareSumTensor& x = a.tensors[t];
    double* partial = x.partial + start / kSquareBlock;
    MEGALM_DISPATCH(x.dtype, T, *partial = square_sum_block(static_cast<const T*>(x.x) + start, stop - start));
  });
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
