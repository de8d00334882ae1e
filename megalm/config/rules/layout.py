"""Rules of the layout: what ranks, layers, heads and batches must have so that the split comes out even."""

from megalm.config.generator import generator_of, generator_problems
from megalm.config.lengths import Lengths
from megalm.config.model import divisors_of
from megalm.config.rules.batch import derived_split_problems, with_micro_batch_size
from megalm.config.rules.pipeline import micro_batch_problems, pipeline_problems
from megalm.config.rules.schedule import phase_problems
from megalm.config.sections import RunConfig
from megalm.config.spans import decoder_seq_length
from megalm.errors import LayoutError


def sample_count(config: RunConfig, data_parallel_size: int) -> list[str]:
    """The run's samples fill a step, and its schedules fit into each other at this batch size."""
    total = config.batch.global_size(data_parallel_size)
    lengths = Lengths.of(config, total)
    found = phase_problems(config, total)
    if lengths.end(config.batch.schedule(data_parallel_size))[0] == 0:
        first = config.batch.schedule(data_parallel_size).sizes[0]
        found.append(f"{lengths.total} is less than the {first} samples of one step; give at least one step")
    return found


def changing_batch_split(config: RunConfig, data_parallel_size: int) -> list[str]:
    """Every size that the global batch has is micro-batches over ranks."""
    sizes, unit = config.batch.schedule(data_parallel_size).sizes, config.batch.micro_size * data_parallel_size
    wrong = [size for size in sizes if size % unit]
    if wrong:
        return [
            f"a step of {wrong[0]} samples, as the batch size changes, is not micro_batch_size="
            f"{config.batch.micro_size} x dp {data_parallel_size} x accumulation ?: every size must be a multiple of "
            f"{unit}"
        ]
    micro, size = config.eval_sizes(data_parallel_size)
    if size % (micro * data_parallel_size):
        nearest = nearest_multiples(size, micro * data_parallel_size)
        return [
            f"eval_global_batch_size={size} = eval_micro_batch_size={micro} x dp {data_parallel_size} x ? has no "
            f"solution: it must be a multiple of {micro * data_parallel_size}; use {nearest}"
        ]
    counts = dict.fromkeys(size // unit for size in sizes)
    return [p for count in counts for p in micro_batch_problems(config.parallel, config.model.total_layers, count)]


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
            f"the number of ranks must be a multiple of {one}; start {nearest_multiples(world_size, one)} ranks"
            f"{_axes_that_fit(config, world_size)}"
        )
        return found + model_split(config)
    return found + model_split(config) + batch_split(config, world_size // one)


def impossible_layout(config: RunConfig) -> list[str]:
    """What does not come out even on any number of ranks, for whoever does not know their number yet."""
    batch = config.batch
    micro, steps = batch.micro_batch_size, batch.gradient_accumulation_steps
    # all three batch sizes name the number of copies of the model; else one copy is the most lenient
    copies = batch.global_batch_size // (micro * steps) if batch.global_batch_size and micro and steps else 1
    return layout_problems(config, _ranks_of_one_model(config) * max(1, copies))


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
        sizes = divisors_of(model.ffn_size)
        found.append(
            f"tensor_model_parallel_size={tp} must divide ffn_hidden_size={model.ffn_size}; use {_nearest(tp, sizes)}, "
            f"or --ffn-hidden-size {nearest_multiples(model.ffn_size, tp)}"
        )
    return found + _generator_split(config) + sequence_split(config) + pipeline_problems(config)


def _generator_split(config: RunConfig) -> list[str]:
    """Heads and MLP of an ELECTRA's generator over tensor-parallel ranks, where the discriminator's come out even."""
    tp, model = config.parallel.tensor_model_parallel_size, config.model
    if not model.generator_layers or generator_problems(model) or model.num_attention_heads % tp:
        return []
    generator = generator_of(model)
    sizes = {"num_attention_heads": generator.num_attention_heads, "ffn_hidden_size": generator.ffn_size}
    return [
        f"tensor_model_parallel_size={tp} must divide {name}={size} of the generator, which has rtd_generator_size="
        f"{model.rtd_generator_size:g} of the discriminator's; use {_nearest(tp, divisors_of(size))}, or a larger "
        "--rtd-generator-size"
        for name, size in sizes.items()
        if size % tp
    ][:1]


def sequence_split(config: RunConfig) -> list[str]:
    """Samples over the ranks of sequence parallelism."""
    tp, length = config.parallel.tensor_model_parallel_size, config.batch.seq_length
    if not config.parallel.sequence_parallel:
        return []
    if tp == 1:
        return ["sequence_parallel=true needs tensor_model_parallel_size > 1; raise it or drop --sequence-parallel"]
    lengths = {"seq_length": length, "decoder_seq_length": decoder_seq_length(config)}
    return [
        f"sequence_parallel=true splits {name}={length} over tensor_model_parallel_size={tp} ranks: it must be "
        f"a multiple of {tp}; use --{name.replace('_', '-')} {nearest_multiples(length, tp)}"
        for name, length in lengths.items()
        if length is not None and length % tp
    ]


def batch_split(config: RunConfig, data_parallel_size: int) -> list[str]:
    """The global batch is micro-batches over ranks and accumulation steps."""
    batch, dp = config.batch, data_parallel_size
    if batch.micro_batch_size is None:
        found = derived_split_problems(config, dp)
        return found or changing_batch_split(with_micro_batch_size(config, dp), dp) + sample_count(config, dp)
    total, micro, steps = batch.global_size(dp), batch.micro_batch_size, batch.gradient_accumulation_steps
    if total % (micro * dp):
        equation = f"global_batch_size={total} = micro_batch_size={micro} x dp {dp} x accumulation ? has no solution"
        way_out = "" if total % dp else ", or leave --micro-batch-size out: it follows"
        nearest = nearest_multiples(total, micro * dp)
        return [f"{equation}: it must be a multiple of {micro * dp}; use {nearest}{way_out}"]
    if steps is not None and total != micro * dp * steps:
        product = f"micro_batch_size={micro} x dp {dp} x gradient_accumulation_steps={steps} = {micro * dp * steps}"
        fix = f"drop gradient_accumulation_steps or set it to {total // (micro * dp)}"
        return [f"global_batch_size={total} is not {product}; {fix}"]
    return changing_batch_split(config, dp) + sample_count(config, dp)


def _ranks_of_one_model(config: RunConfig) -> int:
    parallel = config.parallel
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size


def _axes_that_fit(config: RunConfig, world_size: int) -> str:
    """The nearest sizes of each axis that alone make the ranks come out even, as the end of a sentence."""
    one, ways = _ranks_of_one_model(config), []
    possible = {
        "tensor_model_parallel_size": _tensor_parallel_sizes(config),
        "pipeline_model_parallel_size": list(range(1, config.model.total_layers + 1)),
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
    return [size for size in divisors_of(heads) if _share_heads(kv_heads, size)]


def _share_heads(kv_heads: int, ranks: int) -> bool:
    """Whether key/value heads can be dealt out to ranks, or each rank have one that several hold."""
    return kv_heads % ranks == 0 or ranks % kv_heads == 0


def _nearest(number: int, valid: list[int]) -> str:
    """The values of an ascending list next to `number`."""
    below = [value for value in valid if value < number][-1:]
    return " or ".join(str(value) for value in below + [value for value in valid if value > number][:1])


def nearest_multiples(number: int, factor: int) -> str:
    """The multiples of `factor` around `number`, as a message names them."""
    below = number // factor * factor
    return f"{below} or {below + factor}" if below else str(factor)
