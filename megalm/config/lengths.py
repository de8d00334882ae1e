"""How long a run and its schedules are, in samples, in whichever unit it was said: steps, samples, tokens, fractions.

As Megatron-LM, whose schedules count samples in every run. A run that is measured in steps is at sample step x global
batch size of them, so that its schedules end with it, whatever the batch size was before; a run that is measured in
samples or tokens is at its own sample, so that a change of the batch size does not move it.
"""

from dataclasses import dataclass
from functools import cached_property

from megalm.config.batch_schedule import BatchSchedule
from megalm.config.sections import RunConfig
from megalm.config.training import BatchConfig, OptimizerConfig, TrainingConfig

UNITS = ("iters", "samples", "tokens")


@dataclass(frozen=True)
class Length:
    """A length as it was given."""

    name: str
    value: float
    samples: float
    """The same in samples."""

    def __str__(self) -> str:
        return f"{self.name}={self.value}"


@dataclass(frozen=True)
class Lengths:
    """The lengths of a run of `global_batch_size` samples a step (at the end, where the size changes)."""

    batch: BatchConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    global_batch_size: int

    @classmethod
    def of(cls, config: RunConfig, global_batch_size: int) -> "Lengths":
        """Those of `config`."""
        return cls(config.batch, config.training, config.optimizer, global_batch_size)

    def given(self, stem: str) -> list[Length]:
        """Everything that says how long `stem` (train, lr_decay, lr_warmup, lr_wsd_decay) is; 0 says nothing."""
        section = self.training if stem == "train" else self.optimizer
        found = [(unit, f"{stem}_{unit}", getattr(section, f"{stem}_{unit}")) for unit in UNITS]
        lengths = [Length(name, value, self._samples(unit, value)) for unit, name, value in found if value]
        if stem == "lr_warmup" and self.optimizer.lr_warmup_fraction:
            share = self.optimizer.lr_warmup_fraction
            lengths.append(Length("lr_warmup_fraction", share, share * self.decay.samples))
        return lengths

    def _samples(self, unit: str, value: int) -> float:
        if unit == "iters":
            return value * self.global_batch_size
        return value if unit == "samples" else value / self.batch.seq_length

    @cached_property
    def total(self) -> Length:
        """The run: of train_samples and train_tokens the shorter."""
        return min(self.given("train"), key=lambda length: length.samples)

    @cached_property
    def decay(self) -> Length:
        """From the first sample to the end of the decay."""
        return next(iter(self.given("lr_decay")), self.total)

    @cached_property
    def warmup(self) -> float:
        """Samples of linear warmup; a fraction of the decay is kept as it is."""
        return sum(length.samples for length in self.given("lr_warmup"))

    @cached_property
    def wsd_decay(self) -> float:
        """Samples of the last phase of WSD: a tenth of the decay, unless given."""
        given = self.given("lr_wsd_decay")
        return given[0].samples if given else min(self.decay.samples / 10, self.decay.samples - self.warmup)

    def position(self, step: int, consumed_samples: int) -> int:
        """Where the schedules are at the end of `step` (1 is the first), when so many samples are used."""
        return step * self.global_batch_size if self.training.train_iters is not None else consumed_samples

    def end(self, sizes: BatchSchedule, step: int = 0, consumed_samples: int = 0) -> tuple[int, int]:
        """(steps of the whole run, the sample at which the last ends), where `step` of them have used
        `consumed_samples`, perhaps in other sizes. What does not fill a step is left out, as in Megatron.
        """
        iters = self.training.train_iters
        if iters is not None:
            return iters, consumed_samples + max(0, iters - step) * self.global_batch_size
        more, stop = sizes.steps(consumed_samples, int(self.total.samples))
        return step + more, stop
