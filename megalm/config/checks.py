"""Rules that tie settings together, each a small function from the run to its problems (value, rule and fix).

A new rule is a function here and its name in `CHECKS`. What concerns one section only stands in that section's
`problems()`. Rules that need the number of ranks are in `layout_problems`.
"""

from collections.abc import Callable

from megalm.config.engine_json import deepspeed_only, zero_stage
from megalm.config.micro_batch import derived_split_problems
from megalm.config.pipeline import SCHEDULES, micro_batch_problems, pipeline_problems, schedule_name
from megalm.config.sections import RunConfig
from megalm.errors import LayoutError


def run_problems(config: RunConfig) -> list[str]:
    """Everything about the run that cannot work, whatever the number of ranks."""
    return [problem for check in CHECKS for problem in check(config)]


def sections(config: RunConfig) -> list[str]:
    """Each section's own problems."""
    return config.model.problems() + config.data.problems() + config.recompute.problems()


def lengths(config: RunConfig) -> list[str]:
    """Sample length, run length and the intervals inside the run."""
    found = []
    training, positions = config.training, config.model.max_position_embeddings
    if positions is not None and config.batch.seq_length > positions:
        found.append(
            f"seq_length={config.batch.seq_length} must not exceed max_position_embeddings={positions}; "
            "raise --max-position-embeddings or shorten --seq-length"
        )
    if training.train_iters is None and training.train_samples is None:
        found.append("the length of the run is missing; give --train-iters or --train-samples")
    if training.train_iters is not None and training.train_samples is not None:
        found.append(
            f"train_iters={training.train_iters} and train_samples={training.train_samples} both say how long the run "
            "is; give one of them"
        )
    if config.batch.global_batch_size is not None:
        found += sample_count(config, config.batch.global_batch_size)
    return found


def sample_count(config: RunConfig, global_batch_size: int) -> list[str]:
    """train_samples fills whole steps."""
    samples = config.training.train_samples
    if samples is None or samples % global_batch_size == 0:
        return []
    nearest = _nearest_multiples(samples, global_batch_size)
    return [f"train_samples={samples} must be a multiple of global_batch_size={global_batch_size}; use {nearest}"]


def batch_sizes(config: RunConfig) -> list[str]:
    """A batch size from which the others follow."""
    if config.batch.micro_batch_size is not None or config.batch.global_batch_size is not None:
        return []
    return ["micro_batch_size is missing; give --micro-batch-size N, or --global-batch-size N, from which it follows"]


def recomputation(config: RunConfig) -> list[str]:
    """No more recomputed layers than there are."""
    count, layers = config.recompute.recompute_num_layers, config.model.num_layers
    if count <= layers:
        return []
    return [f"recompute_num_layers={count} must not exceed num_layers={layers}; lower --recompute-num-layers"]


def learning_rate(config: RunConfig) -> list[str]:
    """Peak, end and start of the learning rate."""
    optimizer = config.optimizer
    found = []
    if optimizer.min_lr > optimizer.lr:
        found.append(f"min_lr={optimizer.min_lr} must not exceed lr={optimizer.lr}; lower --min-lr")
    if optimizer.lr_warmup_init > optimizer.lr:
        found.append(
            f"lr_warmup_init={optimizer.lr_warmup_init} must not exceed lr={optimizer.lr}; lower --lr-warmup-init"
        )
    return found


def schedule(config: RunConfig) -> list[str]:
    """Warmup, decay and WSD phases fit into each other."""
    optimizer = config.optimizer
    found = []
    if optimizer.lr_warmup_fraction is not None and optimizer.lr_warmup_iters:
        found.append(
            f"lr_warmup_fraction={optimizer.lr_warmup_fraction} and lr_warmup_iters={optimizer.lr_warmup_iters} both "
            "say how long the warmup is; give one of them"
        )
    name = "lr_decay_iters" if optimizer.lr_decay_iters is not None else "train_iters"
    end = optimizer.lr_decay_iters if optimizer.lr_decay_iters is not None else config.training.train_iters
    if end is not None and optimizer.lr_warmup_iters > end:
        found.append(
            f"lr_warmup_iters={optimizer.lr_warmup_iters} must not exceed {name}={end}; shorten --lr-warmup-iters"
        )
    wsd = optimizer.lr_wsd_decay_iters
    if wsd is not None and optimizer.lr_decay_style != "WSD":
        found.append(
            f"lr_wsd_decay_iters={wsd} needs lr_decay_style=WSD, not {optimizer.lr_decay_style}; "
            "give --lr-decay-style WSD or drop it"
        )
    elif wsd is not None and end is not None and wsd + optimizer.lr_warmup_iters > end:
        found.append(
            f"lr_wsd_decay_iters={wsd} and lr_warmup_iters={optimizer.lr_warmup_iters} must fit into {name}={end}; "
            "shorten one of them"
        )
    return found


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


def checkpoints(config: RunConfig) -> list[str]:
    """Settings of --save and --load come with it."""
    checkpoint = config.checkpoint
    needs_save = {
        "save_interval": checkpoint.save_interval,
        "keep_checkpoints": checkpoint.keep_checkpoints,
        "no_save_optim": checkpoint.no_save_optim,
        "fresh": checkpoint.fresh,
    }
    needs_load = {"finetune": checkpoint.finetune}
    if checkpoint.save is None:  # a run folder whose checkpoint holds no optimizer state may be gone on from
        needs_load["no_load_optim"] = checkpoint.no_load_optim
    found = []
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


UNAVAILABLE_AXES = ("context_parallel_size",)
"""Axes that cannot be larger than 1 in this version. Take a name out when its axis works."""


def available_axes(config: RunConfig) -> list[str]:
    """No axis that this version lacks."""
    sizes = {name: getattr(config.parallel, name) for name in UNAVAILABLE_AXES}
    return [
        f"{name}={size} is not available in this version; use 1 (data parallelism: more ranks, --zero-stage)"
        for name, size in sizes.items()
        if size > 1
    ]


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
    lengths,
    batch_sizes,
    learning_rate,
    schedule,
    precision,
    recomputation,
    evaluation,
    checkpoints,
    engine,
    available_axes,
    pipeline_problems,
    pipeline_engine,
)


def check_layout(config: RunConfig, world_size: int) -> int:
    """The data-parallel size of `world_size` ranks.

    Raises:
        LayoutError: the ranks, the model or the batch cannot be split so; the text has the whole equation.
    """
    problems = layout_problems(config, world_size)
    if problems:
        raise LayoutError(problems)
    return world_size // _ranks_of_one_model(config)


def layout_problems(config: RunConfig, world_size: int) -> list[str]:
    """Everything about the split of ranks, layers, heads and batch that does not come out even."""
    parallel = config.parallel
    found = available_axes(config)
    one = _ranks_of_one_model(config)
    if world_size % one:
        context = f" x cp {parallel.context_parallel_size}" if parallel.context_parallel_size > 1 else ""
        found.append(
            f"world {world_size} = tp {parallel.tensor_model_parallel_size} x pp "
            f"{parallel.pipeline_model_parallel_size}{context} x dp ? has no solution: "
            f"the number of ranks must be a multiple of {one}; start {_nearest_multiples(world_size, one)} ranks"
            f"{_axes_that_fit(config, world_size)}"
        )
        return found + model_split(config)
    return found + model_split(config) + batch_split(config, world_size // one)


def model_split(config: RunConfig) -> list[str]:
    """Heads over tensor-parallel ranks, layers over stages."""
    tp, model = config.parallel.tensor_model_parallel_size, config.model
    found = []
    heads, kv_heads = model.num_attention_heads, model.num_kv_heads
    valid = _tensor_parallel_sizes(config)
    if heads % tp:
        found.append(
            f"tensor_model_parallel_size={tp} must divide num_attention_heads={heads}; use {_nearest(tp, valid)}"
        )
    elif not _share_heads(kv_heads, tp):
        found.append(
            f"tensor_model_parallel_size={tp} must divide num_query_groups={kv_heads} or be a multiple of it; "
            f"use {_nearest(tp, valid)}"
        )
    if model.ffn_size % tp:
        sizes = [size for size in range(1, model.ffn_size + 1) if model.ffn_size % size == 0]
        found.append(
            f"tensor_model_parallel_size={tp} must divide ffn_hidden_size={model.ffn_size}; use {_nearest(tp, sizes)}, "
            f"or --ffn-hidden-size {_nearest_multiples(model.ffn_size, tp)}"
        )
    return found + sequence_split(config) + pipeline_problems(config)


def sequence_split(config: RunConfig) -> list[str]:
    """Samples over the ranks of sequence parallelism."""
    tp, length = config.parallel.tensor_model_parallel_size, config.batch.seq_length
    if not config.parallel.sequence_parallel:
        return []
    if tp == 1:
        return ["sequence_parallel=true needs tensor_model_parallel_size > 1; raise it or drop --sequence-parallel"]
    if length % tp:
        return [
            f"sequence_parallel=true splits seq_length={length} over tensor_model_parallel_size={tp} ranks: it must be "
            f"a multiple of {tp}; use --seq-length {_nearest_multiples(length, tp)}"
        ]
    return []


def batch_split(config: RunConfig, data_parallel_size: int) -> list[str]:
    """The global batch is micro-batches over ranks and accumulation steps."""
    batch, dp = config.batch, data_parallel_size
    if batch.micro_batch_size is None:
        return derived_split_problems(config, dp) + sample_count(config, batch.global_size(dp))
    total, micro, steps = batch.global_size(dp), batch.micro_batch_size, batch.gradient_accumulation_steps
    if total % (micro * dp):
        equation = f"global_batch_size={total} = micro_batch_size={micro} x dp {dp} x accumulation ? has no solution"
        way_out = "" if total % dp else ", or leave --micro-batch-size out: it follows"
        nearest = _nearest_multiples(total, micro * dp)
        return [f"{equation}: it must be a multiple of {micro * dp}; use {nearest}{way_out}"]
    if steps is not None and total != micro * dp * steps:
        product = f"micro_batch_size={micro} x dp {dp} x gradient_accumulation_steps={steps} = {micro * dp * steps}"
        fix = f"drop gradient_accumulation_steps or set it to {total // (micro * dp)}"
        return [f"global_batch_size={total} is not {product}; {fix}"]
    found = micro_batch_problems(config.parallel, config.model.num_layers, total // (micro * dp))
    return found + sample_count(config, total)


def _ranks_of_one_model(config: RunConfig) -> int:
    parallel = config.parallel
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size


def _axes_that_fit(config: RunConfig, world_size: int) -> str:
    """The nearest sizes of each axis that alone make the ranks come out even, as the end of a sentence."""
    one, ways = _ranks_of_one_model(config), []
    possible = {
        "tensor_model_parallel_size": _tensor_parallel_sizes(config),
        "pipeline_model_parallel_size": list(range(1, config.model.num_layers + 1)),
    }
    for name, sizes in possible.items():
        size = getattr(config.parallel, name)
        room, rest = divmod(world_size, one // size)
        valid = [n for n in sizes if room % n == 0]
        if size > 1 and rest == 0 and room and valid:
            ways.append(f", or use --{name.replace('_', '-')} {_nearest(size, valid)}")
    return "".join(ways)


def _tensor_parallel_sizes(config: RunConfig) -> list[int]:
    """The numbers of ranks over which the heads can be spread."""
    heads, kv_heads = config.model.num_attention_heads, config.model.num_kv_heads
    return [size for size in range(1, heads + 1) if heads % size == 0 and _share_heads(kv_heads, size)]


def _share_heads(kv_heads: int, ranks: int) -> bool:
    """Whether key/value heads can be dealt out to ranks, or each rank have one that several hold."""
    return kv_heads % ranks == 0 or ranks % kv_heads == 0


def _nearest(number: int, valid: list[int]) -> str:
    """The values of an ascending list next to `number`."""
    below = [value for value in valid if value < number][-1:]
    return " or ".join(str(value) for value in below + [value for value in valid if value > number][:1])


def _nearest_multiples(number: int, factor: int) -> str:
    below = number // factor * factor
    return f"{below} or {below + factor}" if below else str(factor)


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
