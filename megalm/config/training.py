"""How long, how fast and in which numbers the model trains."""

from fractions import Fraction
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from megalm.config.base import FirstValueOf, FixedOnResume, OneShot, OpenChoice, Section
from megalm.config.batch_schedule import BatchSchedule, read_step_schedule
from megalm.config.ranges import LARGEST_SEED

DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
WsdDecayStyle = Literal["linear", "exponential", "cosine", "minus_sqrt"]

_SCALE = ("optimizer", "loss_scaler", "cur_scale")


class BatchConfig(Section):
    """The sizes of samples and batches."""

    seq_length: Annotated[int, FixedOnResume()] = Field(ge=1)
    """Tokens of one sample."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Samples that one data-parallel rank takes through the model at once. Default: what follows from
    global_batch_size: a rank's whole share, under a pipeline the largest part that gives each stage a micro-batch."""
    global_batch_size: int | None = Field(None, ge=1, le=1 << 40)
    """Samples of one optimizer step over all ranks. Default: micro_batch_size x gradient_accumulation_steps x
    data-parallel size."""
    gradient_accumulation_steps: int | None = Field(None, ge=1)
    """Micro-batches that each rank accumulates in one step. Default: what global_batch_size asks for, else 1."""
    rampup_batch_size: tuple[int, ...] | None = None
    """START INCREMENT SAMPLES: steps begin with START samples, and over the first SAMPLES of the run grow by INCREMENT
    to global_batch_size. For runs in samples or tokens; where a run goes on follows from its samples."""
    step_batch_size_schedule: str | None = None
    """Samples a step from so many tokens on: "0:256 1B:512 4B:1024" (K, M, B, T: thousands, ...). The last size is
    global_batch_size. For runs in samples or tokens."""

    @property
    def micro_size(self) -> int:
        """Samples of one micro-batch."""
        assert self.micro_batch_size is not None, "with_micro_batch_size fills it in"
        return self.micro_batch_size

    def global_size(self, data_parallel_size: int) -> int:
        """Samples of one optimizer step, the last of the run where their number changes."""
        if self.global_batch_size is not None:
            return self.global_batch_size
        if self.step_batch_size_schedule is not None:
            return read_step_schedule(self.step_batch_size_schedule, self.seq_length).sizes[-1]
        return self.micro_size * (self.gradient_accumulation_steps or 1) * data_parallel_size

    def accumulation(self, data_parallel_size: int) -> int:
        """Micro-batches that each rank accumulates in one optimizer step, the last of the run."""
        return self.global_size(data_parallel_size) // (self.micro_size * data_parallel_size)

    def schedule(self, data_parallel_size: int) -> BatchSchedule:
        """Samples of each optimizer step of the run."""
        if self.step_batch_size_schedule is not None:
            return read_step_schedule(self.step_batch_size_schedule, self.seq_length)
        end = self.global_size(data_parallel_size)
        if self.rampup_batch_size is not None:
            start, increment, samples = self.rampup_batch_size
            return BatchSchedule.ramp(start, increment, samples, end)
        return BatchSchedule(((0, end),))


def read_mixture(text: str) -> dict[str, Fraction]:
    """The weights of a text as "causal:0.5,fim:0.5", those of 0 left out.

    Raises:
        ValueError: it is none.
    """
    found: dict[str, Fraction] = {}
    for part in text.replace(",", " ").split():
        name, _, word = part.partition(":")
        try:
            weight = Fraction(word)
        except (ValueError, ZeroDivisionError):
            raise ValueError(f'"{part}" must be an objective and its weight, as causal:0.5') from None
        if weight < 0:
            raise ValueError(f"the weight of {name} must not be negative; leave it out")
        if name in found:
            raise ValueError(f"{name} stands twice; add its weights up")
        found[name] = weight
    if not any(found.values()):
        raise ValueError("the weights sum to 0; give at least one objective a weight, as causal:0.5,fim:0.5")
    return {name: weight for name, weight in found.items() if weight}


def _mixture(text: str | None) -> str | None:
    if text is not None:
        read_mixture(text)
    return text


class TrainingConfig(Section):
    """The length of the run, evaluation and reproducibility."""

    train_iters: int | None = Field(None, ge=1)
    """Optimizer steps of the whole run."""
    train_samples: int | None = Field(None, ge=1, le=2**62)
    """Samples of the whole run, in place of --train-iters; schedules then count samples."""
    train_tokens: int | None = Field(None, ge=1, le=2**62)
    """Tokens of the whole run, in place of --train-iters; with --train-samples the shorter of the two counts."""
    objective: Annotated[str, OpenChoice(("causal", "prefix", "fim", "masked", "rtd", "span", "ul2"))] = "causal"
    """What the model is trained to predict (docs/objectives.md): causal is the next token, prefix the same after a
    prefix that is seen both ways, fim the same of documents whose middle stands at their end; masked the hidden tokens
    (BERT), rtd these and which tokens a generator has replaced (ELECTRA); span what spans of the text were (T5's span
    corruption, for encoder-decoders), ul2 the same of short and long spans and of the rest of a text (UL2)."""
    objective_mixture: Annotated[str | None, AfterValidator(_mixture)] = None
    """Several objectives of one family by turns, in place of --objective: "causal:0.5,fim:0.3,prefix:0.2". Which one a
    sample has follows from its number, in exact shares; the loss of each is reported by its name."""
    eval_interval: int | None = Field(None, ge=1)
    """Steps between two evaluations on the validation set. Default: only at the end of the run."""
    eval_iters: int = Field(100, ge=0)
    """Global batches of one evaluation, the same ones every time; 0 turns evaluation off."""
    eval_global_batch_size: int | None = Field(None, ge=1)
    """Samples of one of them. Default: global_batch_size."""
    eval_micro_batch_size: int | None = Field(None, ge=1)
    """Samples that one data-parallel rank takes through the model at once in an evaluation, of which the loss does not
    depend. Default: micro_batch_size."""
    sample_prompt: str | None = None
    """Text to continue with the likeliest tokens after each evaluation and at the end; the log and TensorBoard show
    it. BERT fills in its masks ("Paris is the [MASK] of France"), T5 writes what its decoder makes of it."""
    sample_tokens: int = Field(32, ge=1)
    """Tokens that continue sample_prompt, as far as seq_length (T5: decoder_seq_length) allows."""
    skip_train: Annotated[bool, OneShot()] = False
    """Load, evaluate and exit."""
    exit_interval: int | None = Field(None, ge=1)
    """Save and exit when the step number is a multiple of this."""
    exit_duration_in_mins: float | None = Field(None, gt=0)
    """Save and exit after this many minutes."""
    seed: Annotated[int, FixedOnResume()] = Field(1234, ge=0, le=LARGEST_SEED)
    """Seed of initial values, sample order and dropout."""
    deterministic_mode: bool = False
    """Only algorithms that give the same bits each time, on GPUs too, where others are faster; one that torch has in no
    other form ends the run."""

    @property
    def objectives(self) -> dict[str, Fraction]:
        """The objectives of the run by name, and the weight of each.

        Raises:
            ValueError: `objective_mixture` is none.
        """
        return {self.objective: Fraction(1)} if self.objective_mixture is None else read_mixture(self.objective_mixture)


class OptimizerConfig(Section):
    """The optimizer and its learning rate."""

    optimizer: Annotated[str, OpenChoice(("adam", "lion", "muon"))] = "adam"
    """Optimizer: adam is AdamW (decoupled weight decay); lion; muon is Muon for the matrices of layers and AdamW for
    embeddings, output head, norms and biases (ZeRO 0 to 2). Only adam runs with offload_optimizer."""
    lr: float = Field(gt=0)
    """Peak learning rate."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the decay."""
    lr_decay_style: DecayStyle = "linear"
    """Shape of the decay after warmup."""
    lr_decay_iters: int | None = Field(None, ge=1)
    """Step at which the decay ends. Default: the end of the run."""
    lr_decay_samples: int | None = Field(None, ge=1, le=2**62)
    """The same in samples."""
    lr_decay_tokens: int | None = Field(None, ge=1, le=2**62)
    """The same in tokens."""
    lr_warmup_iters: int = Field(0, ge=0)
    """Steps of linear warmup from lr_warmup_init."""
    lr_warmup_samples: int = Field(0, ge=0, le=2**62)
    """The same in samples."""
    lr_warmup_tokens: int = Field(0, ge=0, le=2**62)
    """The same in tokens."""
    lr_warmup_fraction: float | None = Field(None, ge=0, le=1)
    """Warmup as a share of the decay, in place of its length."""
    lr_warmup_init: float = Field(0.0, ge=0)
    """Learning rate at the start of warmup."""
    lr_wsd_decay_style: WsdDecayStyle = "exponential"
    """Shape of the last phase of the WSD (warmup, stable, decay) schedule."""
    lr_wsd_decay_iters: int | None = Field(None, ge=1)
    """Steps of the last phase of the WSD schedule. Default: a tenth of the decay."""
    lr_wsd_decay_samples: int | None = Field(None, ge=1, le=2**62)
    """The same in samples."""
    lr_wsd_decay_tokens: int | None = Field(None, ge=1, le=2**62)
    """The same in tokens."""
    decoupled_lr: float | None = Field(None, gt=0)
    """Peak learning rate of the token embedding and the output head. Default: lr."""
    decoupled_min_lr: float | None = Field(None, ge=0)
    """Their rate at the end of the decay. Default: min_lr."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of matrices; norms and biases have none."""
    start_weight_decay: float | None = Field(None, ge=0)
    """Weight decay at the start of the run, with weight_decay_incr_style."""
    end_weight_decay: float | None = Field(None, ge=0)
    """Weight decay at the end of the run."""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """How the weight decay goes from its start to its end over the run; constant: it is weight_decay."""
    clip_grad: float = Field(1.0, ge=0)
    """Gradients are scaled down to this global L2 norm; 0 turns clipping off."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the second moment."""
    adam_eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    lion_beta1: float = Field(0.9, ge=0, lt=1)
    """Share of Lion's momentum in the direction whose sign is its step."""
    lion_beta2: float = Field(0.99, ge=0, lt=1)
    """Decay of Lion's momentum."""
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    """Decay of Muon's momentum (Megatron's default is 0.9)."""
    muon_nesterov: bool = True
    """Nesterov's momentum in Muon (Megatron's default is without)."""
    muon_scale_mode: Literal["spectral", "unit_rms_norm", "shape_scaling"] = "spectral"
    """By what Muon multiplies the orthogonal update of a matrix: spectral, the root of its larger size; unit_rms_norm,
    the root of outputs / inputs; shape_scaling, the same but at least 1."""
    muon_extra_scale_factor: float = Field(1.0, gt=0)
    """Multiplies Muon's updates as well; with spectral, 0.2 gives them the size of AdamW's, so that its learning rate
    and weight decay serve."""
    muon_num_ns_steps: int = Field(5, ge=1, lt=100)
    """Newton-Schulz steps that make an update of Muon orthogonal."""
    muon_coefficient_type: Literal["simple", "quintic"] = "simple"
    """Coefficients of these steps: simple, torch's, or quintic, Megatron's, a set for each of five steps."""
    muon_tp_mode: Literal["blockwise", "duplicated", "distributed"] = "duplicated"
    """What Muon does with a matrix that tensor parallelism cuts: duplicated, every rank gathers it and makes it
    orthogonal; distributed, the ranks sum the products of their shards; both train as one process does. blockwise
    (Megatron's default) makes each shard orthogonal alone: no communication, and another result for every tensor
    parallel size."""


class PrecisionConfig(Section):
    """The numbers that the model computes in; fp32 when neither fp16 nor bf16 is given."""

    bf16: bool = False
    """Weights and activations in bfloat16, fp32 master weights."""
    fp16: bool = False
    """Weights and activations in float16 with loss scaling, fp32 master weights."""
    grad_accum_dtype: Literal["fp32", "model"] = "fp32"
    """Type in which gradients are accumulated and reduced: fp32, or the model's own."""
    loss_scale: Annotated[float | None, FirstValueOf(*_SCALE)] = Field(None, gt=0, le=2.0**100)
    """Fixed loss scale for fp16. Default: dynamic."""
    initial_loss_scale: Annotated[float, FirstValueOf(*_SCALE)] = Field(65536.0, ge=1, le=2.0**100)
    """First dynamic loss scale, a power of two."""
    min_loss_scale: float = Field(1.0, gt=0)
    """Smallest dynamic loss scale."""
    loss_scale_window: int = Field(1000, ge=1)
    """Good steps after which the dynamic loss scale doubles."""
    hysteresis: Annotated[int, FirstValueOf("optimizer", "loss_scaler", "cur_hysteresis")] = Field(2, ge=1)
    """Overflows after which the dynamic loss scale halves."""

    @property
    def dtype(self) -> Literal["bf16", "fp16", "fp32"]:
        """Name of the type of weights and activations."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"
