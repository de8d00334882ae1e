// Every kernel by name, declared for the instruction set at hand.
#pragma once
#include "common.h"

namespace megalm {

struct NormForward;
struct NormBackward;
struct Rotary;
struct Gated;
struct BiasActivation;
struct CrossEntropyForward;
struct CrossEntropyBackward;
struct BiasDropoutAdd;
struct EmbeddingBackward;
struct AdamW;
struct SquareSum;
struct Scale;
struct Softmax;
struct SoftmaxBackward;

#define MEGALM_KERNELS(X)                            \
  X(norm_forward, NormForward)                       \
  X(norm_backward, NormBackward)                     \
  X(rotary, Rotary)                                  \
  X(gated_activation, Gated)                         \
  X(bias_activation, BiasActivation)                 \
  X(cross_entropy_forward, CrossEntropyForward)      \
  X(cross_entropy_backward, CrossEntropyBackward)    \
  X(bias_dropout_add, BiasDropoutAdd)                \
  X(embedding_backward, EmbeddingBackward)           \
  X(adamw_step, AdamW)                               \
  X(square_sum, SquareSum)                           \
  X(scale, Scale)                                    \
  X(softmax_forward, Softmax)                        \
  X(softmax_backward, SoftmaxBackward)

// One implementation of all of them.
struct KernelTable {
#define MEGALM_FIELD(name, Arguments) void (*name)(const Arguments&);
  MEGALM_KERNELS(MEGALM_FIELD)
#undef MEGALM_FIELD
};

inline namespace MEGALM_ISA {
#define MEGALM_DECLARE(name, Arguments) void name(const Arguments& arguments);
MEGALM_KERNELS(MEGALM_DECLARE)
#undef MEGALM_DECLARE
}  // inline namespace MEGALM_ISA

}  // namespace megalm
