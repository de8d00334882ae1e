"""A training step of a whole model in bfloat16: megalm with fused kernels and with torch's, and Hugging Face.

    python benchmarks/train_step.py --style llama                    # or: make bench-train
    python benchmarks/train_step.py --style gpt2 --parts speed gains
    python benchmarks/train_step.py --size 1.3b --seq-length 2048    # on a GPU

The parts, of which --parts chooses:
* speed: tokens/s beside Hugging Face's model, eager and compiled, and the share of the measured peak of products;
* gains: what the step loses where one operator is torch's and all others are fused;
* agreement: losses of 20 steps, fused beside the references; and, as the measure of rounding, the references beside
  themselves with the samples of the batch in another order;
* loss: the step with a loss that keeps all logits and with one that never holds them, time and peak;
* memory: the most that the loss of a vocabulary of 128k takes, head included.

All sides take turns (A B C A B C ...), so that a busy machine slows all of them; medians, and medians of the paired
ratios, are shown. In the speed part each side is a process of its own, set up as its users have it. Every side has the
same weights' shapes, batch and AdamW; megalm keeps float32 master weights and clips, Hugging Face's weights and moments
are bfloat16 and it does not clip (which favours it).
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from kernels import machine
from torch import Tensor

from megalm.config.model import ModelConfig
from megalm.config.training import OptimizerConfig
from megalm.data.batch import Batch
from megalm.engine.host_memory import FreedMemory
from megalm.engine.master_weights import MasterWeights, with_masters
from megalm.engine.optimizers.adamw import AdamSpec
from megalm.engine.optimizers.spec import Surroundings
from megalm.kernels.backend import FUSED, REFERENCE, Kernels
from megalm.kernels.building import library
from megalm.kernels.cross_entropy import cross_entropy, fused_cross_entropy
from megalm.kernels.linear_cross_entropy import linear_cross_entropy
from megalm.models.blocks.operators import use_kernels
from megalm.models.dtypes import DTYPES
from megalm.models.gpt.flops import training_flops_per_token
from megalm.models.gpt.init import initialize
from megalm.models.gpt.model import GPT
from megalm.monitor.tensor_memory import TensorMemory

Step = Callable[[], float]
STYLES: dict[str, dict[str, Any]] = {
    "llama": {
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "disable_bias_linear": True,
    },
    "gpt2": {"openai_gelu": True},
}
SIZES = {
    "124m": {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12},
    "1.3b": {"num_layers": 24, "hidden_size": 2048, "num_attention_heads": 16},
}
GATED_FFN = {"124m": 2048, "1.3b": 5504}
VOCABULARY = 50304
OPTIMIZER = OptimizerConfig(lr=1e-4, adam_beta2=0.95, weight_decay=0.1)
OPERATORS = {
    "norms": ("layer_norm", "rms_norm", "layer_norm_after_add", "rms_norm_after_add"),
    "rotary": ("rotary",),
    "attention": ("attention",),
    "activation": ("gelu", "gelu_tanh", "squared_relu", "swiglu"),
    "loss": ("cross_entropy",),
    "embedding gradient": ("embedding",),
    "AdamW": ("adamw_step",),
    "gradient norm": ("l2_norm",),
}
AGREEMENT_STEPS = 20
LOSS_VOCABULARY = 131072


def model_config(style: str, size: str, length: int, layers: int | None = None) -> ModelConfig:
    """A model of the style and size, vocabulary 50,304."""
    shape = dict(SIZES[size])
    if layers is not None:
        shape["num_layers"] = layers
    if style == "llama":
        shape["ffn_hidden_size"] = GATED_FFN[size]
    options: dict[str, Any] = {**shape, **STYLES[style]}
    return ModelConfig(vocab_size=VOCABULARY, max_position_embeddings=length, **options)


def _adam(groups: list[dict[str, Any]], kernels: Kernels) -> torch.optim.Optimizer:
    """AdamW of stage 0 by these kernels."""
    return AdamSpec().build(groups, OPTIMIZER, Surroundings(zero_stage=0, kernels=kernels))


class Trainer:
    """megalm's model and stage-0 optimizer, and one step of both."""

    def __init__(
        self, config: ModelConfig, kernels: Kernels, tokens: Tensor, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.model = GPT(config)
        initialize(self.model, config, 1)
        self.model.to(tokens.device, dtype)
        ones = torch.ones(tokens.shape, device=tokens.device)
        self.batch = Batch(tensors={"tokens": tokens, "labels": tokens, "loss_mask": ones})
        groups = AdamSpec().parameter_groups(dict(self.model.named_parameters()), OPTIMIZER)
        groups, models = with_masters(groups)
        self.optimizer = MasterWeights(_adam(groups, kernels), models, clip_grad=1.0, accumulate_fp32=True)
        self.use(kernels)
        self.freed_memory = FreedMemory(tokens.device.type == "cpu")  # as the engine does

    def use(self, kernels: Kernels) -> None:
        """Run on these kernels from now on."""
        use_kernels(self.model, kernels)
        self.optimizer.kernels = kernels
        self.optimizer.base = _adam(self.optimizer.param_groups, kernels)
        self.optimizer.base.state = self.optimizer.state

    def __call__(self) -> float:
        """One step; the loss."""
        loss = self.model(self.batch)["lm"].mean()
        loss.backward()
        self.optimizer.step()
        for parameter in self.model.parameters():
            parameter.grad = None
        self.freed_memory.after_step()
        return float(loss.detach())


def hugging_face_step(config: ModelConfig, style: str, tokens: Tensor, compiled: bool) -> Step:
    """One step of the same shape in transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if style == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=config.hidden_size,
                intermediate_size=config.ffn_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_attention_heads,
                max_position_embeddings=tokens.shape[1],
                tie_word_embeddings=True,
            )
        )
    else:
        sizes = GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=config.hidden_size,
            n_layer=config.num_layers,
            n_head=config.num_attention_heads,
            n_positions=tokens.shape[1],
        )
        sizes.resid_pdrop = sizes.embd_pdrop = sizes.attn_pdrop = 0.0
        model = GPT2LMHeadModel(sizes)
    model.to(tokens.device, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    call = torch.compile(model) if compiled else model

    def step() -> float:
        loss = call(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def bf16_peak(device: str) -> float:
    """FLOP/s of the best of some bfloat16 products: 2048-cubes on a CPU, 8192-cubes on a GPU.

    A CPU without bfloat16 instructions takes half a minute for such a cube; there it is a 256-cube.
    """
    if device != "cpu":
        return _product_speed(8192, device)
    small = _product_speed(256, device)
    return small if small < 2e10 else _product_speed(2048, device)


def _product_speed(side: int, device: str) -> float:
    """FLOP/s of the best of eight bfloat16 products of cubes."""
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    times = []
    for _ in range(8):
        wait(device)
        started = time.perf_counter()
        left @ right
        wait(device)
        times.append(time.perf_counter() - started)
    return 2 * side**3 / min(times)


def wait(device: str) -> None:
    """Until the device has done what was asked."""
    if device != "cpu":
        torch.cuda.synchronize()


def in_turns(sides: dict[str, Step], rounds: int, device: str) -> tuple[dict[str, list[float]], float]:
    """Seconds of every side's steps, taken in turns after two that are not counted, and the median peak in between."""
    for step in sides.values():
        step()
        step()  # the first one compiles and makes the moments
    times: dict[str, list[float]] = {name: [] for name in sides}
    peaks = []
    for _ in range(rounds):
        peaks.append(bf16_peak(device))
        for name, step in sides.items():
            wait(device)
            started = time.perf_counter()
            step()
            wait(device)
            times[name].append(time.perf_counter() - started)
    return times, statistics.median(peaks)


def ratio(times: dict[str, list[float]], name: str, own: str) -> float:
    """Median of the paired ratios of a side's times to those of `own`."""
    return statistics.median(b / a for a, b in zip(times[own], times[name], strict=True))


class Process:
    """A side in a process of its own; calling it takes one step there."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(name, arguments, other), daemon=True)
        self.process.start()
        other.close()  # so that the end of the process ends a wait for it

    def __call__(self) -> float:
        """One step; the loss."""
        self.pipe.send("step")
        return float(self.pipe.recv())


def serve(name: str, arguments: argparse.Namespace, pipe: Connection) -> None:
    """Take the steps of one side, as they are asked for."""
    config, tokens = prepare(arguments)
    if name.startswith("megalm"):
        step: Step = Trainer(config, FUSED if name == "megalm fused" else REFERENCE, tokens)
    else:
        step = hugging_face_step(config, arguments.style, tokens, compiled=name.endswith("compiled"))
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        pipe.send(step())


def speed(config: ModelConfig, tokens: Tensor, arguments: argparse.Namespace) -> None:
    """Tokens/s of every side, how much faster the fused step is, and the share of the measured peak."""
    names = ["megalm fused", "megalm reference", "Hugging Face eager", "Hugging Face compiled"]
    if arguments.no_compile:
        names.pop()
    sides: dict[str, Step] = {name: Process(name, arguments) for name in names}
    times, peak = in_turns(sides, arguments.rounds, arguments.device)
    flops = training_flops_per_token(config, tokens.shape[1])
    print(f"bf16 peak {peak / 1e12:.3f} TFLOP/s; a step of matrix products at that peak alone would reach ", end="")
    print(f"{peak / flops:.0f} tokens/s\n\n| step | tokens/s | of peak | fused is |\n|---|---|---|---|")
    for name, seconds in times.items():
        rate = tokens.numel() / statistics.median(seconds)
        print(f"| {name} | {rate:.1f} | {rate * flops / peak:.3f} | {ratio(times, name, 'megalm fused'):.2f}x |")


def gains(config: ModelConfig, tokens: Tensor, arguments: argparse.Namespace) -> None:
    """The step with one operator after the other taken out of the fused ones."""
    trainer = Trainer(config, FUSED, tokens)

    def without(fields: tuple[str, ...]) -> Step:
        kernels = replace(FUSED, **{field: getattr(REFERENCE, field) for field in fields})

        def step() -> float:
            trainer.use(kernels)
            return trainer()

        return step

    unused = {"rotary"} if config.position_embedding_type != "rope" else set()
    sides = {"all fused": without(())}
    sides |= {name: without(fields) for name, fields in OPERATORS.items() if name not in unused}
    sides["none fused"] = without(tuple(field for fields in OPERATORS.values() for field in fields))
    times, _ = in_turns(sides, arguments.rounds, arguments.device)
    own = statistics.median(times["all fused"])
    print(f"all fused: {own:.3f} s\n\n| torch's operator instead | ms a step | of the step |\n|---|---|---|")
    for name in list(sides)[1:]:
        slower = ratio(times, name, "all fused")
        print(f"| {name} | {(slower - 1) * own * 1e3:+.0f} | {(slower - 1) * 100:+.1f} % |")


def agreement(config: ModelConfig, tokens: Tensor, arguments: argparse.Namespace) -> None:
    """Losses of some steps on one batch, learning it."""
    batch = tokens if len(tokens) > 1 else tokens.view(2, -1)
    runs = {"fused": (FUSED, batch), "reference": (REFERENCE, batch), "reordered": (REFERENCE, batch.flip(0))}
    losses = {}
    for name, (kernels, samples) in runs.items():
        trainer = Trainer(config, kernels, samples)
        losses[name] = torch.tensor([trainer() for _ in range(AGREEMENT_STEPS)])
        del trainer
    start, end = losses["fused"][0], losses["fused"][-1]
    print(f"{AGREEMENT_STEPS} steps on {tuple(batch.shape)} tokens, loss {start:.4f} to {end:.4f}; largest difference")
    for name, beside in (("fused", "reference"), ("reordered", "reference")):
        print(f"* {name} and {beside}: {(losses[name] - losses[beside]).abs().max():.5f}")


def loss(config: ModelConfig, tokens: Tensor, arguments: argparse.Namespace) -> None:
    """The step by each --cross-entropy-fusion-impl."""
    trainer = Trainer(config, FUSED, tokens, DTYPES[arguments.dtype])

    def by(linear: bool) -> Step:
        def step() -> float:
            trainer.model.token_loss.linear = linear
            return trainer()

        return step

    sides = {"logits": by(False), "linear": by(True)}
    times, _ = in_turns(sides, arguments.rounds, arguments.device)
    found: list[int] = []
    print("| loss | ms a step | times the first | peak MB beyond weights and moments |\n|---|---|---|---|")
    for name, step in sides.items():
        with peak_bytes(arguments.device, found):
            step()
        own = statistics.median(times[name])
        print(f"| {name} | {own * 1e3:.0f} | {ratio(times, name, 'logits'):.3f} | {found[-1] / 1e6:.0f} |")


@contextmanager
def peak_bytes(device: str, found: list[int]) -> Iterator[None]:
    """Appends the most that tensors made in between took."""
    if device == "cpu":
        with TensorMemory() as memory:
            yield
        found.append(memory.peak_bytes)
        return
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield
    found.append(torch.cuda.max_memory_allocated() - before)


def memory(config: ModelConfig, tokens: Tensor, arguments: argparse.Namespace) -> None:
    """Forward and backward of head and loss, by each of the ways there are."""
    labels = (tokens.flatten() * 2) % LOSS_VOCABULARY
    ways = {
        "eager: cross_entropy(logits.float())": lambda x, w: F.cross_entropy((x @ w.t()).float(), labels),
        "megalm's reference": lambda x, w: cross_entropy(x @ w.t(), labels).mean(),
        "fused, over the logits": lambda x, w: fused_cross_entropy(x @ w.t(), labels, in_place=True).mean(),
        "linear + cross entropy in chunks": lambda x, w: linear_cross_entropy(x, w, labels, fused=True).mean(),
    }
    found: list[int] = []
    width = config.hidden_size
    print(f"{labels.numel()} tokens, width {width}, vocabulary {LOSS_VOCABULARY}, bf16, gradients included\n")
    print("| loss | peak MB | of eager | value |\n|---|---|---|---|")
    for name, way in ways.items():
        torch.manual_seed(1)
        x = torch.randn(labels.numel(), width, device=tokens.device).bfloat16().requires_grad_()
        weight = (0.02 * torch.randn(LOSS_VOCABULARY, width, device=tokens.device)).bfloat16().requires_grad_()
        with peak_bytes(arguments.device, found):
            loss = way(x, weight)
            loss.backward()
        peak, value = found[-1], float(loss.detach())
        print(f"| {name} | {peak / 1e6:.0f} | {peak / found[0]:.3f} | {value:.4f} |", flush=True)
        del x, weight, loss


def prepare(arguments: argparse.Namespace) -> tuple[ModelConfig, Tensor]:
    """The model's configuration and the batch, the same in every process."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    library.load("fused", arguments.device)
    config = model_config(arguments.style, arguments.size, arguments.seq_length, arguments.layers)
    return config, torch.randint(0, VOCABULARY, (arguments.batch, arguments.seq_length), device=arguments.device)


PARTS = {"speed": speed, "gains": gains, "agreement": agreement, "loss": loss, "memory": memory}


def main() -> None:
    """Print the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--style", choices=tuple(STYLES), default="llama")
    parser.add_argument("--size", choices=tuple(SIZES), default="124m")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--layers", type=int, help="fewer than the size has, for a quick look")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="of the part loss")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled Hugging Face model out")
    arguments = parser.parse_args()
    config, tokens = prepare(arguments)
    print(f"{machine(arguments.device)}; {library.load('fused', arguments.device).reason}")
    print(f"{arguments.style} {config.num_layers} x {config.hidden_size}, {tuple(tokens.shape)} tokens, bf16")
    for part in arguments.parts:
        print(f"\n## {part}\n")
        PARTS[part](config, tokens, arguments)


if __name__ == "__main__":
    main()
