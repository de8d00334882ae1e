#include "dispatch.h"

#include "attention.h"

namespace megalm {
namespace {

// Heads of a tensor whose channels are adjacent, in (B, T, heads, C).
Tensor adjacent(const Tensor& x) { return x.stride(3) == 1 ? x : torch::stable::contiguous(x); }
Heads heads_of(const Tensor& x) {
  return {static_cast<const bf16*>(x.const_data_ptr()), {x.stride(0), x.stride(1), x.stride(2)}};
}
bf16* halves(const Tensor& x) { return static_cast<bf16*>(x.mutable_data_ptr()); }

void check_attention(const Tensor& q, const Tensor& k, const Tensor& v) {
  MEGALM_CHECK(widest_instruction_set() == InstructionSet::kAvx512Bf16,
               "attention needs a processor with AVX-512's bfloat16 instructions");
  check_same(k, v, "keys and values");
  MEGALM_CHECK(q.dim() == 4 && k.dim() == 4 && q.size(0) == k.size(0) && q.size(1) == k.size(1) &&
                   q.size(3) == k.size(3) && q.size(3) % 16 == 0 && k.size(2) > 0 && q.size(2) % k.size(2) == 0,
               "attention needs q (B, T, H, C), k and v (B, T, G, C), H a multiple of G, C of 16");
  MEGALM_CHECK(dtype_of(q) == Dtype::kBFloat16 && dtype_of(k) == Dtype::kBFloat16, "attention is of bfloat16");
}

Attention attention_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& y, const Tensor& logsumexp,
                       double scale) {
  return {heads_of(q), heads_of(k), heads_of(v), halves(y), floats(logsumexp), q.size(0), q.size(1), q.size(2),
          k.size(2), q.size(3), static_cast<float>(scale)};
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  check_attention(q, k, v);
  const Tensor y = empty(q, shape_of(q)), logsumexp = empty(q, {q.size(0), q.size(2), q.size(1)}, ScalarType::Float);
  const Tensor rows[] = {adjacent(q), adjacent(k), adjacent(v)};
#if defined(__x86_64__)
  avx512_bf16::attention_forward(attention_of(rows[0], rows[1], rows[2], y, logsumexp, scale));
#endif
  return {y, logsumexp};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& y, const Tensor& logsumexp,
                                                      double scale) {
  check_attention(q, k, v);
  check_same(grad, q, "gradient and queries");
  const Tensor out = packed(y), lse = checked(q, logsumexp, ScalarType::Float, q.size(0) * q.size(1) * q.size(2),
                                              "logsumexp");
  check_same(out, q, "output and queries");
  const Tensor rows[] = {adjacent(q), adjacent(k), adjacent(v), adjacent(grad)};
  const Tensor grads[] = {empty(q, shape_of(q)), empty(k, shape_of(k)), empty(v, shape_of(v))};
#if defined(__x86_64__)
  avx512_bf16::attention_backward({attention_of(rows[0], rows[1], rows[2], out, lse, scale), heads_of(rows[3]),
                                   halves(grads[0]), halves(grads[1]), halves(grads[2])});
#endif
  return {grads[0], grads[1], grads[2]};
}

}  // namespace

MEGALM_SCHEMA(m) {
  m.def("attention(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor y, Tensor logsumexp)");
  m.def("attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor y, Tensor logsumexp, float scale)"
        " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
}

STABLE_TORCH_LIBRARY_IMPL(megalm, CPU, m) {  // on GPUs torch's runs
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace megalm
