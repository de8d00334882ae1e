// Causal self-attention of bfloat16 heads on CPUs, block by block: no scores are kept (Dao et al. 2022, FlashAttention,
// arXiv:2205.14135; the backward as in Dao 2023, arXiv:2307.08691).
#pragma once
#include "common.h"

namespace megalm {

struct Heads {  // (batch, length, heads, width) by the strides of the first three, channels adjacent
  const bf16* data;
  int64_t strides[3];
};

struct Attention {
  Heads q, k, v;  // k and v have `groups` heads
  bf16* y;  // (batch, length, heads, width), contiguous
  float* logsumexp;  // (batch, heads, length), of scale q k
  int64_t batch, length, heads, groups, width;
  float scale;
};

struct AttentionBackward {
  Attention forward;  // its y and logsumexp are read
  Heads grad;
  bf16 *grad_q, *grad_k, *grad_v;  // contiguous
};

// The only copy: it lives on the instruction set's products of bfloat16 pairs.
namespace avx512_bf16 {
void attention_forward(const Attention& arguments);
void attention_backward(const AttentionBackward& arguments);
}  // namespace avx512_bf16

}  // namespace megalm
