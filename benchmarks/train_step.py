"""Time of a training step of a 124M model in bfloat16: megalm with fused kernels and with torch's, and Hugging Face.

All take turns in one process (A B C A B C ...), so that a busy machine slows all of them; medians and ratios are shown.
Every side has the same weights' shapes, batch and AdamW; megalm keeps float32 master weights and clips, Hugging Face's
weights and moments are bfloat16 and it does not clip (which favours it).
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from megalm.config.model import ModelConfig
from megalm.engine.optimizer import ReplicatedAdamW, parameter_groups
from megalm.kernels import library
from megalm.kernels.choice import FUSED, REFERENCE, Kernels
from megalm.models.flops import training_flops_per_token
from megalm.models.gpt import GPT
from megalm.models.init import initialize
from megalm.models.layers import use_kernels

Step = Callable[[], float]
STYLES = {
    "llama": {
        "ffn_hidden_size": 2048,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "disable_bias_linear": True,
    },
    "gpt2": {"openai_gelu": True},
}


def model_config(style: str, layers: int, length: int) -> ModelConfig:
    """12 x 768, 12 heads, vocabulary 50,304."""
    return ModelConfig(
        num_layers=layers,
        hidden_size=768,
        num_attention_heads=12,
        vocab_size=50304,
        max_position_embeddings=length,
        **STYLES[style],
    )


def megalm_step(config: ModelConfig, kernels: Kernels, tokens: torch.Tensor) -> Step:
    """One step of megalm's model and stage-0 optimizer."""
    model = GPT(config)
    initialize(model, config, 1)
    use_kernels(model, kernels)
    model.to(torch.bfloat16)
    optimizer = ReplicatedAdamW(
        parameter_groups(model, 0.1), clip_grad=1.0, accumulate_fp32=True, kernels=kernels, lr=1e-4, betas=(0.9, 0.95)
    )

    def step() -> float:
        loss = model(tokens, labels_BT=tokens).mean()
        loss.backward()
        optimizer.step()
        for parameter in model.parameters():
            parameter.grad = None
        return float(loss.detach())

    return step


def hugging_face_step(config: ModelConfig, style: str, tokens: torch.Tensor, compiled: bool) -> Step:
    """One step of the same shape in transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if style == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.ffn_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_attention_heads,
                max_position_embeddings=tokens.shape[1],
                tie_word_embeddings=True,
            )
        )
    else:
        sizes = GPT2Config(vocab_size=config.vocab_size, n_layer=config.num_layers, n_positions=tokens.shape[1])
        sizes.resid_pdrop = sizes.embd_pdrop = sizes.attn_pdrop = 0.0
        model = GPT2LMHeadModel(sizes)
    model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    call = torch.compile(model) if compiled else model

    def step() -> float:
        loss = call(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def bf16_peak() -> float:
    """FLOP/s of the best of some bfloat16 products of 2048-cubes."""
    left, right = (torch.randn(2048, 2048).bfloat16() for _ in range(2))
    times = []
    for _ in range(8):
        started = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(times)


def main() -> None:
    """Take turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--style", choices=tuple(STYLES), default="llama")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled Hugging Face model out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = model_config(arguments.style, arguments.layers, arguments.seq_length)
    tokens = torch.randint(0, 50304, (arguments.batch, arguments.seq_length))
    loaded = library.load("fused")
    sides = {
        "megalm fused": megalm_step(config, FUSED, tokens),
        "megalm reference": megalm_step(config, REFERENCE, tokens),
        "Hugging Face eager": hugging_face_step(config, arguments.style, tokens, compiled=False),
    }
    if not arguments.no_compile:
        sides["Hugging Face compiled"] = hugging_face_step(config, arguments.style, tokens, compiled=True)
    losses = {name: [step(), step()] for name, step in sides.items()}  # compiles, makes the moments
    times: dict[str, list[float]] = {name: [] for name in sides}
    peaks = []
    for _ in range(arguments.rounds):
        peaks.append(bf16_peak())
        for name, step in sides.items():
            started = time.perf_counter()
            losses[name].append(step())
            times[name].append(time.perf_counter() - started)
    print(f"{arguments.style} {arguments.layers} x 768, {tuple(tokens.shape)} tokens, bf16, {loaded.reason}")
    report(times, config, tokens, statistics.median(peaks))
    gap = max(abs(a - b) for a, b in zip(losses["megalm fused"], losses["megalm reference"], strict=True))
    print(f"largest difference of the losses, fused and reference: {gap:.4f} of {losses['megalm fused'][-1]:.3f}")


def report(times: dict[str, list[float]], config: ModelConfig, tokens: torch.Tensor, peak: float) -> None:
    """One line a side: tokens/s, ratio to it of the fused step, share of the measured peak."""
    fused = times["megalm fused"]
    flops = training_flops_per_token(config, tokens.shape[1])
    print(f"bf16 peak (2048-cube) {peak / 1e12:.3f} TFLOP/s")
    print(f"{'':24}{'tokens/s':>10}{'of peak':>9}{'fused is':>10}")
    for name, seconds in times.items():
        rate = tokens.numel() / statistics.median(seconds)
        ratio = statistics.median(b / a for a, b in zip(fused, seconds, strict=True))
        print(f"{name:24}{rate:10.1f}{rate * flops / peak:9.2f}{ratio:9.2f}x")


if __name__ == "__main__":
    main()
