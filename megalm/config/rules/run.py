"""Rules that tie settings together, each a small function from the run to its problems (value, rule and fix).

A new rule is a function here and its name in `CHECKS`. What concerns one section only stands in that section's
`problems()`. Rules that need the number of ranks are in `layout_problems`.
"""

from collections.abc import Callable, Iterator

from megalm.config.base import OpenChoice
from megalm.config.deepspeed.write import deepspeed_only, zero_stage
from megalm.config.merging.suggest import did_you_mean
from megalm.config.rules.distillation import distillation
from megalm.config.rules.encoder import encoder
from megalm.config.rules.encoder_decoder import encoder_decoder
from megalm.config.rules.layout import available_axes
from megalm.config.rules.objective import ahead, objectives
from megalm.config.rules.pipeline import SCHEDULES, pipeline_problems, schedule_name
from megalm.config.rules.schedule import changing_batch, phases, rates, run_length
from megalm.config.rules.segments import consecutive, segments
from megalm.config.sections import RunConfig


def run_problems(config: RunConfig) -> list[str]:
    """Everything about the run that cannot work, whatever the number of ranks."""
    return [problem for check in CHECKS for problem in check(config)]


def sections(config: RunConfig) -> list[str]:
    """Each section's own problems."""
    return config.model.problems() + config.data.problems() + config.recompute.problems()


def open_choices(config: RunConfig) -> list[str]:
    """A name that megalm does not know comes from a module of the user's."""
    if config.extensions.import_module:
        return []
    return [
        f"{name}={value} must be one of {', '.join(known)}{did_you_mean(value, known)}; or name the module that adds "
        "it: --import-module MODULE"
        for name, value, known in _named(config)
        if value not in known
    ]


def _named(config: RunConfig) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(setting, value, known names) of every setting that names an entry of a table."""
    for _, section in config:
        for name, info in type(section).model_fields.items():
            value = getattr(section, name)
            known = next((m.names for m in info.metadata if isinstance(m, OpenChoice)), None)
            if name == "objective":
                value = tuple(config.training.objectives)
            if known is not None and value is not None:
                yield from ((name, word, known) for word in ([value] if isinstance(value, str) else value))


def lengths(config: RunConfig) -> list[str]:
    """Sample length."""
    found = []
    positions = config.model.max_position_embeddings
    if positions is not None and config.batch.seq_length > positions and not config.model.encoder_decoder:
        found.append(
            f"seq_length={config.batch.seq_length} must not exceed max_position_embeddings={positions}; "
            "raise --max-position-embeddings or shorten --seq-length"
        )
    return found


def batch_sizes(config: RunConfig) -> list[str]:
    """A batch size from which the others follow."""
    batch = config.batch
    if batch.micro_batch_size or batch.global_batch_size or batch.step_batch_size_schedule:
        return []
    return ["micro_batch_size is missing; give --micro-batch-size N, or --global-batch-size N, from which it follows"]


def recomputation(config: RunConfig) -> list[str]:
    """No more recomputed layers than there are."""
    count, layers = config.recompute.recompute_num_layers, config.model.total_layers
    if count <= layers:
        return []
    return [f"recompute_num_layers={count} must not exceed {config.model.said_layers}; lower --recompute-num-layers"]


def precision(config: RunConfig) -> list[str]:
    """One type, and a loss scale that DeepSpeed can represent."""
    numbers = config.precision
    found = []
    if numbers.bf16 and numbers.fp16:
        found.append("bf16=true and fp16=true exclude each other; add --no-bf16 or --no-fp16")
    if not numbers.fp16:
        if numbers.loss_scale is not None:
            found.append(f"loss_scale={numbers.loss_scale} needs fp16=true; give --fp16 or drop it")
        return found
    if numbers.initial_loss_scale.hex().split("p")[0] != "0x1.0000000000000":
        found.append(f"initial_loss_scale={numbers.initial_loss_scale} must be a power of two, as 65536")
    if numbers.min_loss_scale != int(numbers.min_loss_scale) or numbers.min_loss_scale > numbers.initial_loss_scale:
        found.append(
            f"min_loss_scale={numbers.min_loss_scale} must be a whole number up to "
            f"initial_loss_scale={numbers.initial_loss_scale}"
        )
    return found


def evaluation(config: RunConfig) -> list[str]:
    """Evaluation that is asked for has batches and data."""
    training, data = config.training, config.data
    if training.eval_interval is None and not training.skip_train:
        return []
    asked = "skip_train=true" if training.skip_train else f"eval_interval={training.eval_interval}"
    if training.eval_iters == 0:
        return [f"{asked} asks for evaluation but eval_iters=0 turns it off; drop one of them"]
    if data.train_data_path is not None and data.valid_data_path is None:
        return [f"{asked} asks for evaluation; give its data in --valid-data-path"]
    if data.data_path is not None and not data.problems() and data.split_shares()[1] == 0:
        return [f'{asked} asks for evaluation but split="{data.split}" leaves it no data; give validation a share']
    return []


def loss(config: RunConfig) -> list[str]:
    """The loss without all logits knows no soft-capping."""
    softcap = config.model.final_logit_softcapping
    if config.kernels.cross_entropy_fusion_impl != "linear" or softcap is None:
        return []
    return [
        f"cross_entropy_fusion_impl=linear does not know final_logit_softcapping={softcap}; "
        "use --cross-entropy-fusion-impl logits"
    ]


def checkpoints(config: RunConfig) -> list[str]:
    """Settings of --save and --load come with it."""
    checkpoint = config.checkpoint
    needs_save = {
        "save_interval": checkpoint.save_interval,
        "keep_checkpoints": checkpoint.keep_checkpoints,
        "save_retain_interval": checkpoint.save_retain_interval,
        "keep_best_checkpoints": checkpoint.keep_best_checkpoints,
        "no_save_optim": checkpoint.no_save_optim,
        "fresh": checkpoint.fresh,
    }
    needs_load = {"finetune": checkpoint.finetune}
    if checkpoint.save is None:  # a run folder whose checkpoint holds no optimizer state may be gone on from
        needs_load["no_load_optim"] = checkpoint.no_load_optim
    found = []
    if (best := checkpoint.keep_best_checkpoints) is not None and config.training.eval_interval is None:
        found.append(
            f"keep_best_checkpoints={best} needs validation losses; give --eval-interval N, of which --save-interval "
            "is a multiple"
        )
    for flag, path, settings in (("--save", checkpoint.save, needs_save), ("--load", checkpoint.load, needs_load)):
        for name, value in settings.items():
            if value and path is None:
                found.append(f"{name}={_shown(value)} needs a folder; give {flag} FOLDER")
    return found


def engine(config: RunConfig) -> list[str]:
    """The engine is DeepSpeed, and offload fits the ZeRO stage."""
    found = []
    if not config.engine.deepspeed:
        found.append("deepspeed=false is not possible: the engine is always DeepSpeed's; drop --no-deepspeed")
    stage = zero_stage(config)
    zero = deepspeed_only(config).get("zero_optimization", {})
    for block, least in (("offload_optimizer", 1), ("offload_param", 3)):
        device = zero.get(block, {}).get("device", "none")
        if device != "none" and stage < least:
            found.append(f"zero_optimization.{block}.device={device} needs zero_stage >= {least}, not {stage}")
    return found


def optimizer(config: RunConfig) -> list[str]:
    """An optimizer that goes with the ZeRO stage."""
    name, stage = config.optimizer.optimizer, zero_stage(config)
    found = []
    if name == "muon" and stage > 2:
        found.append(
            f"optimizer=muon needs whole matrices, of which ZeRO stage {stage} leaves every rank a part only; use "
            "--zero-stage 2, or --optimizer adam"
        )
    return found


def pipeline_engine(config: RunConfig) -> list[str]:
    """ZeRO 3 with schedules that do not split backward passes."""
    name = schedule_name(config.parallel)
    if (
        config.parallel.pipeline_model_parallel_size == 1
        or zero_stage(config) < 3
        or not SCHEDULES[name].splits_backward
    ):
        return []
    whole = " or ".join(other for other, rule in SCHEDULES.items() if not rule.splits_backward)
    return [
        f"pipeline_schedule={name} computes weight gradients after ZeRO stage 3 has taken the weights away; use "
        f"--zero-stage 2, or --pipeline-schedule {whole}"
    ]


CHECKS: tuple[Callable[[RunConfig], list[str]], ...] = (
    sections,
    open_choices,
    lengths,
    batch_sizes,
    run_length,
    phases,
    rates,
    changing_batch,
    precision,
    recomputation,
    evaluation,
    loss,
    objectives,
    ahead,
    distillation,
    encoder,
    encoder_decoder,
    consecutive,
    segments,
    checkpoints,
    engine,
    optimizer,
    available_axes,
    pipeline_problems,
    pipeline_engine,
)


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
