// From torch tensors to kernel arguments and back: checks and allocation.
#define MEGALM_ISA any
#include "activation.h"
#include "attention.h"
#include "cross_entropy.h"
#include "dispatch.h"
#include "dropout.h"
#include "embedding.h"
#include "norm.h"
#include "optimizer.h"
#include "parallel.h"
#include "rotary.h"
#include "softmax.h"
#include "tensors.h"

namespace megalm {

void parallel_for_raw(int64_t size, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, size, grain, body, context));
}

namespace {

// Parts whose sums over rows are kept apart: fixed, so that results do not depend on the number of threads. On GPUs the
// most there can be: a kernel takes as many as run at once.
int64_t num_chunks(const Tensor& x, int64_t rows) { return std::min<int64_t>(rows, x.is_cuda() ? 1024 : 32); }

float* floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor, Tensor> norm(const Tensor& x, const OptionalTensor& residual, const Tensor& weight,
                                                const OptionalTensor& bias, double epsilon, bool center) {
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
                                                 bool center, bool has_bias) {
  check_same(grad, x, "gradient and input");
  if (grad_sum) check_same(*grad_sum, x, "gradient and input");
  const Rows g(grad), gs(grad_sum ? *grad_sum : grad), rows(x);
  const Tensor w = checked(x, weight, ScalarType::Float, rows.cols, "weight");
  const Tensor means = checked(x, mean, ScalarType::Float, center ? rows.rows : 0, "mean"),
               rstds = checked(x, rstd, ScalarType::Float, rows.rows, "rstd");
  const int64_t chunks = num_chunks(x, rows.rows);
  const Tensor grad_x = empty(x, shape_of(x)), grad_weight = empty(x, {rows.cols}, ScalarType::Float);
  const Tensor grad_bias = empty(x, {has_bias ? rows.cols : 0}, ScalarType::Float);
  const Tensor partial = empty(x, {has_bias ? 2 : 1, chunks, rows.cols}, ScalarType::Float);
  const NormBackward arguments{
      g.data(), grad_sum ? gs.data() : nullptr, rows.data(), floats(w), floats(means), floats(rstds),
      grad_x.mutable_data_ptr(), floats(partial), has_bias ? floats(partial) + chunks * rows.cols : nullptr,
      floats(grad_weight), has_bias ? floats(grad_bias) : nullptr, rows.rows, rows.cols, chunks, g.stride, gs.stride,
      rows.stride, center, dtype_of(x)};
  run::norm_backward(x, arguments);
  return {grad_x, grad_weight, grad_bias};
}

void rotate(const Tensor& x, const Tensor& y, const Tensor& cos, const Tensor& sin, bool inverse) {
  MEGALM_CHECK(x.dim() == 4 && cos.dim() == 3, "rotary needs (B, T, H, C) and tables (B or 1, T, R/2)");
  const int64_t batch = x.size(0), length = x.size(1), half = cos.size(2);
  MEGALM_CHECK(shape_of(cos) == shape_of(sin) && cos.size(1) == length && 2 * half <= x.size(3) &&
                   (cos.size(0) == batch || cos.size(0) == 1),
               "rotary tables do not fit the input");
  const Tensor c = checked(x, cos, ScalarType::Float, cos.numel(), "cosines"),
               s = checked(x, sin, ScalarType::Float, cos.numel(), "sines");
  const Rotary arguments{x.const_data_ptr(), y.mutable_data_ptr(), floats(c), floats(s), batch, length, x.size(2),
                         x.size(3), half, {x.stride(0), x.stride(1), x.stride(2)},
                         {y.stride(0), y.stride(1), y.stride(2)}, cos.size(0) == 1 ? 0 : length * half, inverse,
                         dtype_of(x)};
  run::rotary(x, arguments);
}

Tensor rotary_new(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  const Tensor input = x.dim() == 4 && x.size(3) > 1 && x.stride(3) != 1 ? torch::stable::contiguous(x) : x;
  const Tensor y = empty(x, shape_of(x));
  rotate(input, y, cos, sin, inverse);
  return y;
}

void rotary_in_place(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool inverse) {
  for (const Tensor& x : {q, k}) {
    MEGALM_CHECK(x.dim() == 4 && (x.size(3) <= 1 || x.stride(3) == 1), "rotary in place needs adjacent channels");
    rotate(x, x, cos, sin, inverse);
  }
}

Activation kind_of(int64_t kind) {
  MEGALM_CHECK(kind >= 0 && kind <= 3, "unknown activation ", kind);
  return static_cast<Activation>(kind);
}

Tensor gated(const Tensor& gate, const Tensor& up, int64_t kind) {
  check_same(gate, up, "gate and up");
  const Rows g(gate), u(up);
  const Tensor y = empty(gate, shape_of(gate));
  const Gated arguments{g.data(), u.data(), nullptr, y.mutable_data_ptr(), nullptr, nullptr, g.rows, g.cols, g.stride,
                        u.stride, 0, kind_of(kind), dtype_of(gate)};
  run::gated_activation(gate, arguments);
  return y;
}

std::tuple<Tensor, Tensor> gated_backward(const Tensor& grad, const Tensor& gate, const Tensor& up, int64_t kind) {
  check_same(gate, up, "gate and up");
  check_same(gate, grad, "gate and gradient");
  const Rows g(gate), u(up), d(grad);
  const Tensor grad_gate = empty(gate, shape_of(gate)), grad_up = empty(gate, shape_of(gate));
  if (g.rows * g.cols == 0) return {grad_gate, grad_up};
  const Gated arguments{g.data(), u.data(), d.data(), nullptr, grad_gate.mutable_data_ptr(), grad_up.mutable_data_ptr(),
                        g.rows, g.cols, g.stride, u.stride, d.stride, kind_of(kind), dtype_of(gate)};
  run::gated_activation(gate, arguments);
  return {grad_gate, grad_up};
}

Tensor bias_act(const Tensor& x, const OptionalTensor& bias, int64_t kind) {
  const Rows rows(x);
  const Tensor b = bias ? checked(x, *bias, ScalarType::Float, rows.cols, "bias") : x;
  const Tensor y = empty(x, shape_of(x));
  const BiasActivation arguments{rows.data(), nullptr, bias ? floats(b) : nullptr, y.mutable_data_ptr(), nullptr,
                                 nullptr, rows.rows, rows.cols, rows.rows, rows.stride, 0, kind_of(kind), dtype_of(x)};
  run::bias_activation(x, arguments);
  return y;
}

std::tuple<Tensor, Tensor> bias_act_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& bias,
                                             int64_t kind) {
  check_same(grad, x, "gradient and input");
  const Rows g(grad), rows(x);
  const int64_t chunks = bias ? num_chunks(x, rows.rows) : rows.rows;
  const Tensor b = bias ? checked(x, *bias, ScalarType::Float, rows.cols, "bias") : x;
  const Tensor grad_x = empty(x, shape_of(x)), grad_bias = empty(x, {bias ? rows.cols : 0}, ScalarType::Float);
  const Tensor partial = empty(x, {bias ? chunks : 0, rows.cols}, ScalarType::Float);
  if (!bias && rows.rows * rows.cols == 0) return {grad_x, grad_bias};
  const BiasActivation arguments{rows.data(), g.data(), bias ? floats(b) : nullptr, grad_x.mutable_data_ptr(),
                                 bias ? floats(partial) : nullptr, bias ? floats(grad_bias) : nullptr, rows.rows,
                                 rows.cols, chunks, rows.stride, g.stride, kind_of(kind), dtype_of(x)};
  run::bias_activation(x, arguments);
  return {grad_x, grad_bias};
}

void check_labels(const Tensor& labels, int64_t num_classes) {
  const int64_t* ids = static_cast<const int64_t*>(labels.const_data_ptr());
  for (int64_t i = 0; i < labels.numel(); ++i) {
    MEGALM_CHECK(ids[i] >= 0 && ids[i] < num_classes, "label ", ids[i], " must lie in [0, ", num_classes, ")");
  }
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& labels, int64_t start,
                                                 int64_t num_classes, bool whole) {
  MEGALM_CHECK(logits.dim() == 2 && num_classes >= 0 && num_classes <= logits.size(1),
               "logits must be (N, V), V at least ", num_classes);
  const Rows rows(logits);
  const Tensor ids = checked(logits, labels, ScalarType::Long, rows.rows, "labels");
  if (whole && !ids.is_cuda()) check_labels(ids, num_classes);
  const Tensor max = empty(logits, {rows.rows}, ScalarType::Float), sum = empty(logits, {rows.rows}, ScalarType::Float);
  const Tensor target = empty(logits, {rows.rows}, ScalarType::Float);
  const CrossEntropyForward arguments{rows.data(), static_cast<const int64_t*>(ids.const_data_ptr()), floats(max),
                                      floats(sum), floats(target), rows.rows, num_classes, rows.stride, start, whole,
                                      dtype_of(logits)};
  run::cross_entropy_forward(logits, arguments);
  return {max, sum, target};
}

void cross_entropy_grad_into(const Rows& rows, const Tensor& grad, int64_t grad_stride, const Tensor& labels,
                             const Tensor& logsumexp, const Tensor& scale, int64_t start, int64_t num_classes,
                             double z_loss) {
  MEGALM_CHECK(num_classes >= 0 && num_classes <= rows.cols, "num_classes must not exceed the logits' width");
  const Tensor ids = checked(grad, labels, ScalarType::Long, rows.rows, "labels"),
               lse = checked(grad, logsumexp, ScalarType::Float, rows.rows, "logsumexp"),
               scales = checked(grad, scale, ScalarType::Float, rows.rows, "scale");
  const CrossEntropyBackward arguments{
      rows.data(), static_cast<const int64_t*>(ids.const_data_ptr()), floats(lse), floats(scales),
      grad.mutable_data_ptr(), rows.rows, num_classes, rows.cols, rows.stride, grad_stride, start,
      static_cast<float>(z_loss), dtype_of(grad)};
  run::cross_entropy_backward(grad, arguments);
}

Tensor cross_entropy_backward_new(const Tensor& logits, const Tensor& labels, const Tensor& logsumexp,
                                  const Tensor& scale, int64_t start, int64_t num_classes, double z_loss) {
  const Tensor grad = empty(logits, shape_of(logits));
  const Rows rows(logits);
  cross_entropy_grad_into(rows, grad, rows.cols, labels, logsumexp, scale, start, num_classes, z_loss);
  return grad;
}

void cross_entropy_backward_in_place(const Tensor& logits, const Tensor& labels, const Tensor& logsumexp,
                                     const Tensor& scale, int64_t start, int64_t num_classes, double z_loss) {
  MEGALM_CHECK(logits.dim() == 2 && (logits.size(1) <= 1 || logits.stride(1) == 1),
               "the gradient in place needs logits (N, V) whose columns are adjacent");
  const Rows rows(logits);
  cross_entropy_grad_into(rows, logits, rows.stride, labels, logsumexp, scale, start, num_classes, z_loss);
}

Tensor bias_dropout_add(const Tensor& x, const OptionalTensor& bias, const OptionalTensor& residual, const Tensor& seed,
                        double probability, int64_t run, int64_t run_stride, int64_t first) {
  MEGALM_CHECK(probability >= 0 && probability < 1, "dropout probability ", probability, " must lie in [0, 1)");
  MEGALM_CHECK(run > 0 && run_stride >= 0 && first >= 0, "the rows of a mask come in runs of at least 1");
  if (residual) check_same(x, *residual, "input and residual");
  const Rows rows(x), other(residual ? *residual : x);
  const Tensor b = bias ? checked(x, *bias, ScalarType::Float, rows.cols, "bias") : x;
  const Tensor s = checked(x, seed, ScalarType::Long, 1, "seed");
  const Tensor y = empty(x, shape_of(x));
  const BiasDropoutAdd arguments{rows.data(), bias ? floats(b) : nullptr, residual ? other.data() : nullptr,
                                 y.mutable_data_ptr(), static_cast<const int64_t*>(s.const_data_ptr()),
                                 static_cast<float>(probability), rows.rows, rows.cols, rows.stride, other.stride,
                                 run, run_stride, first, dtype_of(x)};
  run::bias_dropout_add(x, arguments);
  return y;
}

Tensor embedding_backward(const Tensor& grad, const Tensor& ids, const Tensor& order, int64_t num_rows) {
  const Rows rows(grad);
  const Tensor sorted = checked(grad, ids, ScalarType::Long, rows.rows, "ids"),
               places = checked(grad, order, ScalarType::Long, rows.rows, "order");
  const Tensor out = empty(grad, {num_rows, rows.cols});
  const Tensor starts = empty(grad, {num_rows + 1}, ScalarType::Long);
  const EmbeddingBackward arguments{rows.data(), static_cast<const int64_t*>(sorted.const_data_ptr()),
                                    static_cast<const int64_t*>(places.const_data_ptr()), out.mutable_data_ptr(),
                                    static_cast<int64_t*>(starts.mutable_data_ptr()), rows.rows, num_rows, rows.cols,
                                    rows.stride, dtype_of(grad)};
  run::embedding_backward(grad, arguments);
  return out;
}

void check_list_entry(const Tensor& on, const Tensor& x, int64_t size, const char* what) {
  MEGALM_CHECK(x.numel() == size && x.is_contiguous() && same_device(on, x), what,
               " must be contiguous, on one device and of equal sizes");
}

constexpr float narrow(double x) { return static_cast<float>(x); }

void adamw(const std::vector<Tensor>& masters, const std::vector<Tensor>& first, const std::vector<Tensor>& second,
           const std::vector<Tensor>& grads, const std::vector<Tensor>& models, double factor, double lr, double beta1,
           double beta2, double epsilon, double weight_decay, int64_t step) {
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

void scale_in_place(const std::vector<Tensor>& tensors, double factor) {
  if (tensors.empty()) return;
  std::vector<ScaleTensor> parts;
  for (const Tensor& x : tensors) {
    check_list_entry(tensors[0], x, x.numel(), "tensors");
    parts.push_back({x.mutable_data_ptr(), x.numel(), dtype_of(x)});
  }
  run::scale(tensors[0], Scale{parts.data(), static_cast<int64_t>(parts.size()), narrow(factor)});
}

Tensor softmax(const Tensor& scores, const OptionalTensor& visible, const OptionalTensor& query_documents,
               const OptionalTensor& key_documents, double scale, bool causal) {
  MEGALM_CHECK(scores.dim() == 4, "scores must be (B, H, T, S)");
  MEGALM_CHECK(query_documents.has_value() == key_documents.has_value(), "documents of queries and keys go together");
  const Tensor x = packed(scores), y = empty(scores, shape_of(scores));
  const int64_t batch = x.size(0), heads = x.size(1), queries = x.size(2), keys = x.size(3);
  Softmax arguments{x.const_data_ptr(), nullptr, nullptr, nullptr, y.mutable_data_ptr(), batch, heads, queries, keys,
                    {0, 0, 0}, static_cast<float>(scale), causal, dtype_of(x)};
  if (visible) {
    const Tensor& mask = *visible;
    MEGALM_CHECK(mask.scalar_type() == ScalarType::Bool && mask.dim() == 4 && mask.size(3) == keys &&
                     (keys <= 1 || mask.stride(3) == 1) && same_device(x, mask),
                 "the mask must be bool, (B or 1, H or 1, T or 1, S), its keys adjacent, on the device of the scores");
    for (int d = 0; d < 3; ++d) {
      MEGALM_CHECK(mask.size(d) == x.size(d) || mask.size(d) == 1, "the mask does not broadcast to the scores");
      arguments.visible_strides[d] = mask.size(d) == 1 ? 0 : mask.stride(d);
    }
    arguments.visible = static_cast<const bool*>(mask.const_data_ptr());
  }
  const Tensor q = query_documents ? checked(x, *query_documents, ScalarType::Long, batch * queries, "documents") : x;
  const Tensor k = key_documents ? checked(x, *key_documents, ScalarType::Long, batch * keys, "documents") : x;
  if (query_documents) {
    arguments.query_documents = static_cast<const int64_t*>(q.const_data_ptr());
    arguments.key_documents = static_cast<const int64_t*>(k.const_data_ptr());
  }
  run::softmax_forward(x, arguments);
  return y;
}

Tensor softmax_backward(const Tensor& grad, const Tensor& y, double scale) {
  check_same(grad, y, "gradient and output");
  const Tensor g = packed(grad), out = packed(y), grad_scores = empty(y, shape_of(y));
  const Rows rows(out);
  const SoftmaxBackward arguments{g.const_data_ptr(), out.const_data_ptr(), grad_scores.mutable_data_ptr(), rows.rows,
                                  rows.cols, static_cast<float>(scale), dtype_of(y)};
  run::softmax_backward(y, arguments);
  return grad_scores;
}

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

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("norm", TORCH_BOX(&norm));
  m.impl("norm_backward", TORCH_BOX(&norm_backward));
  m.impl("rotary", TORCH_BOX(&rotary_new));
  m.impl("rotary_", TORCH_BOX(&rotary_in_place));
  m.impl("gated_activation", TORCH_BOX(&gated));
  m.impl("gated_activation_backward", TORCH_BOX(&gated_backward));
  m.impl("bias_activation", TORCH_BOX(&bias_act));
  m.impl("bias_activation_backward", TORCH_BOX(&bias_act_backward));
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward_new));
  m.impl("cross_entropy_backward_", TORCH_BOX(&cross_entropy_backward_in_place));
  m.impl("bias_dropout_add", TORCH_BOX(&bias_dropout_add));
  m.impl("embedding_backward", TORCH_BOX(&embedding_backward));
  m.impl("adamw_", TORCH_BOX(&adamw));
  m.impl("square_sum", TORCH_BOX(&square_sum));
  m.impl("scale_", TORCH_BOX(&scale_in_place));
  m.impl("softmax", TORCH_BOX(&softmax));
  m.impl("softmax_backward", TORCH_BOX(&softmax_backward));
}

}  // namespace
}  // namespace megalm

// The CPU's instruction set in use: 0 generic, 1 AVX2, 2 AVX-512, 3 with bfloat16. `limit` lowers it; -1 only asks.
extern "C" __attribute__((visibility("default"))) int megalm_instruction_set(int limit) {
  const int widest = static_cast<int>(megalm::widest_instruction_set());
  static int chosen = widest;
  if (limit >= 0) {
    chosen = std::min(limit, widest);
    megalm::cpu_kernels() = megalm::kernels_of(static_cast<megalm::InstructionSet>(chosen));
  }
  return chosen;
}

// Calls for CPU tensors go to this table from now on: how the tests run the CUDA sources without a device.
extern "C" __attribute__((visibility("default"))) void megalm_set_cpu_kernels(const megalm::KernelTable* table) {
  megalm::cpu_kernels() = table;
}

STABLE_TORCH_LIBRARY_IMPL(megalm, CPU, m) {
  megalm::implement(m);
  m.impl("attention", TORCH_BOX(&megalm::attention));
  m.impl("attention_backward", TORCH_BOX(&megalm::attention_backward));
}
#if defined(MEGALM_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(megalm, CUDA, m) { megalm::implement(m); }
#endif
