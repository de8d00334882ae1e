// The one list of operator signatures. Implementations are in bindings.cpp; beside each operator's
// reference, in megalm/kernels/, are its fake implementation and its gradient.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(megalm, m) {
  m.def("norm(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float epsilon, bool center)"
        " -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)");
  m.def("norm_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool center,"
        " bool has_bias) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  m.def("rotary(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor");
  m.def("rotary_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, bool inverse) -> ()");
  m.def("gated_activation(Tensor gate, Tensor up, int kind) -> Tensor");
  m.def("gated_activation_backward(Tensor grad, Tensor gate, Tensor up, int kind)"
        " -> (Tensor grad_gate, Tensor grad_up)");
  m.def("bias_activation(Tensor x, Tensor? bias, int kind) -> Tensor");
  m.def("bias_activation_backward(Tensor grad, Tensor x, Tensor? bias, int kind) -> (Tensor grad_x, Tensor grad_bias)");
  m.def("cross_entropy(Tensor logits, Tensor labels, int start, int num_classes, bool whole)"
        " -> (Tensor max, Tensor sum, Tensor target)");
  m.def("cross_entropy_backward(Tensor logits, Tensor labels, Tensor logsumexp, Tensor scale, int start,"
        " int num_classes, float z_loss) -> Tensor");
  m.def("cross_entropy_backward_(Tensor(a!) logits, Tensor labels, Tensor logsumexp, Tensor scale, int start,"
        " int num_classes, float z_loss) -> ()");
  m.def("bias_dropout_add(Tensor x, Tensor? bias, Tensor? residual, Tensor seed, float probability, int run,"
        " int run_stride, int first) -> Tensor");
  m.def("embedding_backward(Tensor grad, Tensor ids, Tensor order, int rows) -> Tensor");
  m.def("adamw_(Tensor(a!)[] masters, Tensor(b!)[] first, Tensor(c!)[] second, Tensor[] grads, Tensor(d!)[] models,"
        " float factor, float lr, float beta1, float beta2, float epsilon, float weight_decay, int step) -> ()");
  m.def("square_sum(Tensor[] tensors) -> Tensor");
  m.def("scale_(Tensor(a!)[] tensors, float factor) -> ()");
  m.def("softmax(Tensor scores, Tensor? visible, Tensor? query_documents, Tensor? key_documents, float scale,"
        " bool causal) -> Tensor");
  m.def("softmax_backward(Tensor grad, Tensor y, float scale) -> Tensor");
  m.def("attention(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor y, Tensor logsumexp)");
  m.def("attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor y, Tensor logsumexp, float scale)"
        " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
}
