"""A training step of a whole model: megalm with fused kernels and with torch's, and Hugging Face.

    python benchmarks/train_step.py --style llama                    # or: make bench-train
    python benchmarks/train_step.py --style bert --parts speed gains
    python benchmarks/train_step.py --size 1.3b --seq-length 2048    # on a GPU

The parts, of which --parts chooses:
* speed: tokens/s beside Hugging Face's model, eager and compiled, and the share of what matrix products at the measured
  peak alone would allow;
* gains: what the step loses where one operator is torch's and all others are fused;
* agreement: losses of 20 steps, fused beside the references; and, as the measure of rounding, the references beside
  themselves with the samples of the batch in another order;
* loss: the step with a loss that keeps all logits and with one that never holds them, time and peak;
* memory: the most that the loss of a vocabulary of 128k takes, head included.

All sides take turns (A B C A B C ...), so that a busy machine slows all of them, and in its turn each takes a block of
consecutive steps, of which the first, after its wait, is not counted. Medians, and medians of the paired ratios of
blocks, are shown. In the speed part each side is a process of its own, set up as its users have it. Every side has the
same weights' shapes, batch and AdamW. In bfloat16 megalm keeps float32 master weights and clips, Hugging Face's weights
and moments are bfloat16 and it does not clip (which favours it). Where bfloat16 products are slower than those in
float32, all sides are in float32 (--dtype), and the output says so. Tokens of a T5 are those of its encoder.
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
from styles import STYLES, Fields
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
from megalm.models.families import FAMILIES
from megalm.monitor.tensor_memory import TensorMemory

Step = Callable[[], float]
Block = Callable[[int], list[float]]
"""Takes so many consecutive steps; the seconds of each."""
SIZES = {
    "124m": {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12},
    "1.3b": {"num_layers": 24, "hidden_size": 2048, "num_attention_heads": 16},
}
GATED_FFN = {"124m": 2048, "1.3b": 5504}
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
    """A model of the style and size."""
    shape = dict(SIZES[size])
    if layers is not None:
        shape["num_layers"] = layers
    return STYLES[style].config(shape, GATED_FFN[size], length)


def _adam(groups: list[dict[str, Any]], kernels: Kernels) -> torch.optim.Optimizer:
    """AdamW of stage 0 by these kernels."""
    return AdamSpec().build(groups, OPTIMIZER, Surroundings(zero_stage=0, kernels=kernels))


class Trainer:
    """megalm's model and stage-0 optimizer, and one step of both."""

    def __init__(self, config: ModelConfig, kernels: Kernels, fields: Fields, dtype: torch.dtype) -> None:
        family, device = FAMILIES[config.model_family], fields["tokens"].device
        self.model: Any = family.build(config)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(family.initial_value(name, tuple(parameter.shape), config, 1))
        self.model.to(device, dtype)
        self.batch = Batch(tensors=fields)
        groups = AdamSpec().parameter_groups(dict(self.model.named_parameters()), OPTIMIZER)
        groups, models = with_masters(groups)
        self.optimizer = MasterWeights(_adam(groups, kernels), models, clip_grad=1.0, accumulate_fp32=True)
        self.use(kernels)
        self.freed_memory = FreedMemory(device.type == "cpu")  # as the engine does

    def use(self, kernels: Kernels) -> None:
        """Run on these kernels from now on."""
        use_kernels(self.model, kernels)
        self.optimizer.kernels = kernels
        self.optimizer.base = _adam(self.optimizer.param_groups, kernels)
        self.optimizer.base.state = self.optimizer.state

    def __call__(self) -> float:
        """One step; the loss."""
        loss = self.model(self.batch)["lm"].sum() / self.model.counts(self.batch)["lm"].sum()
        loss.backward()
        self.optimizer.step()
        for parameter in self.model.parameters():
            parameter.grad = None
        self.freed_memory.after_step()
        return float(loss.detach())


def hugging_face_step(config: ModelConfig, arguments: argparse.Namespace, fields: Fields, compiled: bool) -> Step:
    """One step of the same shape in transformers."""
    model = STYLES[arguments.style].transformers(config).to(arguments.device, DTYPES[arguments.dtype])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    call = torch.compile(model) if compiled else model

    def step() -> float:
        loss = call(**fields).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def chosen_dtype(device: str) -> str:
    """bf16, but fp32 where this device multiplies bfloat16 slower than float32."""
    speeds = {name: product_speed(256, device, DTYPES[name]) for name in ("bf16", "fp32")}
    return "bf16" if speeds["bf16"] > speeds["fp32"] else "fp32"


def peak_speed(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the best of some products: 2048-cubes on a CPU, 8192-cubes on a GPU.

    A CPU without bfloat16 instructions takes half a minute for such a cube of them; there it is a 256-cube.
    """
    if device != "cpu":
        return product_speed(8192, device, dtype)
    small = product_speed(256, device, dtype)
    return small if small < 2e10 else product_speed(2048, device, dtype)


def product_speed(side: int, device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the best of eight products of cubes."""
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
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


def block_of(step: Step, device: str) -> Block:
    """A side that takes its steps in this process."""

    def take(count: int) -> list[float]:
        times = []
        for _ in range(count):
            wait(device)
            started = time.perf_counter()
            step()
            wait(device)
            times.append(time.perf_counter() - started)
        return times

    return take


def in_turns(sides: dict[str, Block], arguments: argparse.Namespace) -> tuple[dict[str, list[float]], float]:
    """The median seconds of a step in each of every side's blocks, taken in turns, and the median peak in between."""
    for take in sides.values():
        take(2)  # the first one compiles and makes the moments
    times: dict[str, list[float]] = {name: [] for name in sides}
    peaks = []
    for _ in range(arguments.rounds):
        peaks.append(peak_speed(arguments.device, DTYPES[arguments.dtype]))
        for name, take in sides.items():
            times[name].append(statistics.median(take(1 + arguments.block)[1:]))
    return times, statistics.median(peaks)


def ratio(times: dict[str, list[float]], name: str, own: str) -> float:
    """Median of the paired ratios of a side's times to those of `own`."""
    return statistics.median(b / a for a, b in zip(times[own], times[name], strict=True))


class Process:
    """A side in a process of its own; calling it takes a block of steps there."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(name, arguments, other), daemon=True)
        self.process.start()
        other.close()  # so that the end of the process ends a wait for it

    def __call__(self, count: int) -> list[float]:
        """Seconds of each step."""
        self.pipe.send(count)
        times: list[float] = self.pipe.recv()
        return times


def serve(name: str, arguments: argparse.Namespace, pipe: Connection) -> None:
    """Take the steps of one side, as they are asked for."""
    config, tokens = prepare(arguments)
    ours, theirs = STYLES[arguments.style].batch(tokens)
    if name.startswith("megalm"):
        kernels = FUSED if name == "megalm fused" else REFERENCE
        step: Step = Trainer(config, kernels, ours, DTYPES[arguments.dtype])
    else:
        step = hugging_face_step(config, arguments, theirs, compiled=name.endswith("compiled"))
    take = block_of(step, arguments.device)
    while True:
        try:
            count = pipe.recv()
        except EOFError:
            return
        pipe.send(take(count))


def speed(config: ModelConfig, tokens: Tensor, arguments: argparse.Namespace) -> None:
    """Tokens/s of every side, how much faster the fused step is, and the share of the measured peak."""
    names = ["megalm fused", "megalm reference", "Hugging Face eager", "Hugging Face compiled"]
    if arguments.no_compile:
        names.pop()
    sides: dict[str, Block] = {name: Process(name, arguments) for name in names}
    times, peak = in_turns(sides, arguments)
    flops = FAMILIES[config.model_family].training_flops_per_token(config, tokens.shape[1])
    print(f"{arguments.dtype} peak {peak / 1e12:.3f} TFLOP/s; matrix products at that peak alone would reach ", end="")
    print(f"{peak / flops:.0f} tokens/s\n\n| step | tokens/s | of that | fused is |\n|---|---|---|---|")
    for name, seconds in times.items():
        rate = tokens.numel() / statistics.median(seconds)
        print(f"| {name} | {rate:.1f} | {rate * flops / peak:.3f} | {ratio(times, name, 'megalm fused'):.2f}x |")


def gains(config: ModelConfig, tokens: Tensor, arguments: argparse.Namespace) -> None:
    """The step with one operator after the other taken out of the fused ones."""
    style = STYLES[arguments.style]
    trainer = Trainer(config, FUSED, style.batch(tokens)[0], DTYPES[arguments.dtype])

    def without(fields: tuple[str, ...]) -> Block:
        kernels = replace(FUSED, **{field: getattr(REFERENCE, field) for field in fields})

        def step() -> float:
            trainer.use(kernels)
            return trainer()

        return block_of(step, arguments.device)

    sides = {"all fused": without(())}
    sides |= {name: without(fields) for name, fields in OPERATORS.items() if name not in style.lacks}
    sides["none fused"] = without(tuple(field for fields in OPERATORS.values() for field in fields))
    times, _ = in_turns(sides, arguments)
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
        trainer = Trainer(config, kernels, STYLES[arguments.style].batch(samples)[0], DTYPES[arguments.dtype])
        losses[name] = torch.tensor([trainer() for _ in range(AGREEMENT_STEPS)])
        del trainer
    start, end = losses["fused"][0], losses["fused"][-1]
    print(f"{AGREEMENT_STEPS} steps on {tuple(batch.shape)} tokens, loss {start:.4f} to {end:.4f}; largest difference")
    for name, beside in (("fused", "reference"), ("reordered", "reference")):
        print(f"* {name} and {beside}: {(losses[name] - losses[beside]).abs().max():.5f}")


def loss(config: ModelConfig, tokens: Tensor, arguments: argparse.Namespace) -> None:
    """The step by each --cross-entropy-fusion-impl."""
    trainer = Trainer(config, FUSED, STYLES[arguments.style].batch(tokens)[0], DTYPES[arguments.dtype])

    def by(linear: bool) -> Block:
        def step() -> float:
            trainer.model.token_loss.linear = linear
            return trainer()

        return block_of(step, arguments.device)

    sides = {"logits": by(False), "linear": by(True)}
    times, _ = in_turns(sides, arguments)
    found: list[int] = []
    print("| loss | ms a step | times the first | peak MB beyond weights and moments |\n|---|---|---|---|")
    for name, take in sides.items():
        with peak_bytes(arguments.device, found):
            take(1)
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
    width, dtype = config.hidden_size, DTYPES[arguments.dtype]
    print(f"{labels.numel()} tokens, width {width}, vocabulary {LOSS_VOCABULARY}, gradients included\n")
    print("| loss | peak MB | of eager | value |\n|---|---|---|---|")
    for name, way in ways.items():
        torch.manual_seed(1)
        x = torch.randn(labels.numel(), width, device=tokens.device).to(dtype).requires_grad_()
        weight = (0.02 * torch.randn(LOSS_VOCABULARY, width, device=tokens.device)).to(dtype).requires_grad_()
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
    assert config.vocab_size is not None, "every style has a vocabulary"
    shape = (arguments.batch, arguments.seq_length)
    return config, torch.randint(0, config.vocab_size, shape, device=arguments.device)


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
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: bf16, fp32 if that is faster")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--block", type=int, default=3, help="steps that count in each turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled Hugging Face model out")
    arguments = parser.parse_args()
    config, tokens = prepare(arguments)
    print(f"{machine(arguments.device)}; {library.load('fused', arguments.device).reason}")
    if arguments.dtype == "auto":
        arguments.dtype = chosen_dtype(arguments.device)
        if arguments.dtype == "fp32":
            print("all in fp32: this machine multiplies bf16 slower; --dtype bf16 for it all the same")
    print(
        f"{arguments.style} {config.num_layers} x {config.hidden_size}, {tuple(tokens.shape)} tokens, {arguments.dtype}"
    )
    for part in arguments.parts:
        print(f"\n## {part}\n")
        PARTS[part](config, tokens, arguments)


if __name__ == "__main__":
    main()
