"""Rules of lengths: of the run, of its schedules and of its batch sizes, in whichever unit they were given.

All of them look at samples. Where the global batch size follows from the number of ranks, they are asked again with it.
"""

from megalm.config.batch_schedule import MOST_SIZES, read_step_schedule
from megalm.config.lengths import Length, Lengths
from megalm.config.sections import RunConfig

STEMS = {
    "train": "the run",
    "lr_decay": "the decay",
    "lr_warmup": "the warmup",
    "lr_wsd_decay": "the last phase of WSD",
}


def run_length(config: RunConfig) -> list[str]:
    """One thing says how long the run is, one how long each phase is that its schedules have."""
    if not _known(config, 1).given("train"):
        return ["the length of the run is missing; give --train-iters, --train-samples or --train-tokens"]
    found = []
    for stem, what in STEMS.items():
        given = _known(config, 1).given(stem)
        if len(given) > 1 and {length.name for length in given} != {"train_samples", "train_tokens"}:
            both = " and ".join(map(str, given))
            found.append(f"{both} {'both' if len(given) == 2 else 'all'} say how long {what} is; give one of them")
    wsd, style = _known(config, 1).given("lr_wsd_decay"), config.optimizer.lr_decay_style
    if wsd and style != "WSD":
        found.append(f"{wsd[0]} needs lr_decay_style=WSD, not {style}; give --lr-decay-style WSD or drop it")
    return found


def phases(config: RunConfig) -> list[str]:
    """Phases fit into each other, as far as that does not depend on the number of ranks."""
    if config.batch.global_batch_size is not None:
        return phase_problems(config, config.batch.global_batch_size)
    units = {length.name.rpartition("_")[2] for stem in STEMS for length in _known(config, 1).given(stem)}
    alike = "iters" not in units or not {"samples", "tokens"} & units
    return phase_problems(config, 1) if alike and not run_length(config) else []


def phase_problems(config: RunConfig, global_batch_size: int) -> list[str]:
    """Warmup, decay and the last phase of WSD fit into each other."""
    lengths = _known(config, global_batch_size)
    if not lengths.given("train"):
        return []
    warmup, wsd, end = lengths.given("lr_warmup"), lengths.given("lr_wsd_decay"), lengths.decay
    found = [_too_long(length, end) for length in warmup if length.samples > end.samples]
    if wsd and wsd[0].samples + lengths.warmup > end.samples and not found:
        phases = " and ".join(_sized(length, end) for length in [*wsd, *warmup])
        found.append(f"{phases} must fit into {_sized(end, *wsd)}; shorten one of them")
    return found


def rates(config: RunConfig) -> list[str]:
    """Peak, end and start of learning rates and weight decay."""
    optimizer = config.optimizer
    found = []
    for prefix in ("", "decoupled_"):
        lr, least = getattr(optimizer, f"{prefix}lr"), getattr(optimizer, f"{prefix}min_lr")
        if lr is None and least is not None:
            found.append(f"{prefix}min_lr={least} needs {prefix}lr; give --decoupled-lr or drop it")
        if lr is None:
            continue
        least = optimizer.min_lr if least is None else least
        if least > lr:
            name = f"{prefix}min_lr" if getattr(optimizer, f"{prefix}min_lr") is not None else "min_lr"
            found.append(f"{name}={least} must not exceed {prefix}lr={lr}; lower --{name.replace('_', '-')}")
        if optimizer.lr_warmup_init > lr:
            start = f"lr_warmup_init={optimizer.lr_warmup_init}"
            found.append(f"{start} must not exceed {prefix}lr={lr}; lower --lr-warmup-init")
    return found + _weight_decay(config)


def _weight_decay(config: RunConfig) -> list[str]:
    """A growing weight decay has a start and an end; a constant one has neither."""
    optimizer, style = config.optimizer, config.optimizer.weight_decay_incr_style
    ends = {name: getattr(optimizer, name) for name in ("start_weight_decay", "end_weight_decay")}
    given = [f"{name}={value}" for name, value in ends.items() if value is not None]
    if style == "constant" and given:
        return [
            f"{' and '.join(given)} need a way from one to the other; give --weight-decay-incr-style linear or cosine, "
            "or use --weight-decay"
        ]
    if style != "constant" and len(given) < 2:
        return [f"weight_decay_incr_style={style} needs --start-weight-decay and --end-weight-decay"]
    start, end = ends.values()
    if start is not None and end is not None and start > end:
        return [f"start_weight_decay={start} must not exceed end_weight_decay={end}; weight decay only grows"]
    return []


def changing_batch(config: RunConfig) -> list[str]:
    """What makes the global batch size change is well formed and goes with the rest."""
    batch, ramp, steps = config.batch, config.batch.rampup_batch_size, config.batch.step_batch_size_schedule
    if ramp is None and steps is None:
        return []
    if ramp is not None and steps is not None:
        return ["rampup_batch_size and step_batch_size_schedule both say the size of steps; give one of them"]
    name = "step_batch_size_schedule" if ramp is None else "rampup_batch_size"
    found = _ramp(config) if ramp is not None else _step_schedule(config)
    if config.training.train_iters is not None:
        found.append(
            f"{name} makes the samples of a step change, so train_iters={config.training.train_iters} does not say how "
            "many samples the run has; give --train-samples or --train-tokens"
        )
    if batch.gradient_accumulation_steps is not None:
        steps_given = f"gradient_accumulation_steps={batch.gradient_accumulation_steps}"
        found.append(f"{steps_given} cannot be kept where {name} changes the batch; drop it")
    return found


def _ramp(config: RunConfig) -> list[str]:
    ramp, end = config.batch.rampup_batch_size, config.batch.global_batch_size
    assert ramp is not None
    shown = "rampup_batch_size=" + " ".join(map(str, ramp))
    if len(ramp) != 3:
        return [f"{shown} must be three numbers: START INCREMENT SAMPLES"]
    start, increment, samples = ramp
    if min(start, increment) < 1 or samples < 0:
        return [f"{shown} must be START and INCREMENT of at least 1 and SAMPLES of at least 0"]
    if end is None:
        return [f"{shown} needs the size at which it ends; give --global-batch-size"]
    if start > end:
        return [f"{shown} starts above global_batch_size={end}; lower START"]
    if (end - start) % increment:
        return [f"{shown} does not reach global_batch_size={end}: {end} - {start} must be a multiple of {increment}"]
    if (end - start) // increment > MOST_SIZES:
        return [f"{shown} gives the batch more than {MOST_SIZES} sizes; raise INCREMENT"]
    return []


def _step_schedule(config: RunConfig) -> list[str]:
    text, end = config.batch.step_batch_size_schedule, config.batch.global_batch_size
    assert text is not None
    shown = f'step_batch_size_schedule="{text}"'
    try:
        last = read_step_schedule(text, config.batch.seq_length).sizes[-1]
    except ValueError as error:
        return [f'{shown} {error}; write it as "0:256 1B:512"']
    if end not in (None, last):
        return [f"{shown} ends with {last} samples a step, but global_batch_size={end}; drop --global-batch-size"]
    return []


def _known(config: RunConfig, global_batch_size: int) -> Lengths:
    return Lengths.of(config, global_batch_size)


def _too_long(length: Length, end: Length) -> str:
    flag = length.name.replace("_", "-")
    return f"{_sized(length, end)} must not exceed {_sized(end, length)}; shorten --{flag}"


def _sized(length: Length, *others: Length) -> str:
    """The length, also in samples where another one is in another unit."""
    unit = length.name.rpartition("_")[2]
    return str(length) if all(o.name.endswith(unit) for o in others) else f"{length} ({length.samples:g} samples)"
