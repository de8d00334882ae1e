"""What samples in their order need, and segment recurrence, which needs such samples."""

from megalm.config.data import BlendSpec
from megalm.config.rules.objective import OBJECTIVES_OF, is_given, says_nothing
from megalm.config.sections import RunConfig

_PATHS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")


def consecutive(config: RunConfig) -> list[str]:
    """Rows that read on are as many in every step, and of one dataset."""
    if config.data.sampling != "consecutive":
        return []
    found = [
        f"{name} changes how many rows there are, of which sampling=consecutive lets each read on; drop one of them"
        for name in ("rampup_batch_size", "step_batch_size_schedule")
        if getattr(config.batch, name) is not None
    ]
    found += [
        f"sampling=consecutive reads one dataset on, and {name} has {len(blend.prefixes)}; merge them into one "
        "(megalm merge), or use --sampling stream"
        for name in _PATHS
        if not (name == "valid_data_path" and config.data.multiple_validation_sets)
        and (blend := _blend(config, name)) is not None
        and len(blend.prefixes) > 1
    ]
    if config.data.full_validation:
        found.append(
            "full_validation=true does not go with sampling=consecutive, whose rows all end together; use --eval-iters"
        )
    return found


def segments(config: RunConfig) -> list[str]:
    """Segment recurrence has text that goes on, positions that tell distances, and every layer of a model in one
    place.
    """
    model, size = config.model, config.model.segment_memory
    if size is None:
        return []
    if model.model_family != "gpt":
        known = model.model_family in OBJECTIVES_OF
        return [says_nothing(config, "segment_memory", "model_family=gpt")] if known else []
    memory = f"segment_memory={size}"
    return _text(config, memory) + _positions(config, memory) + _layout(config, memory)


def _text(config: RunConfig, memory: str) -> list[str]:
    data, found = config.data, []
    if data.sampling != "consecutive":
        found.append(
            f"{memory} needs samples that go on where the row's last one ended, not sampling={data.sampling}; give "
            "--sampling consecutive, or drop --segment-memory"
        )
    if others := [name for name in config.training.objectives if name != "causal"]:
        found.append(
            f"{memory} is for texts as they stand, which objective={others[0]} changes; use --objective causal, or "
            "drop --segment-memory"
        )
    for name in ("reset_attention_mask", "reset_position_ids"):
        if getattr(data, name):
            found.append(
                f"{name}=true parts the documents, and {memory} reaches over their ends, as in Transformer-XL; drop "
                "one of them"
            )
    return found


def _positions(config: RunConfig, memory: str) -> list[str]:
    model, found = config.model, []
    kind, length = model.position_embedding_type, config.batch.seq_length
    if kind == "learned_absolute":
        found.append(
            f"{memory} needs positions that say how far apart two tokens are, and position_embedding_type={kind} gives "
            "those of the memory and of the sample the same numbers; use --position-embedding-type relative or rope"
        )
    if model.max_position_embeddings not in (None, length):
        found.append(
            f"max_position_embeddings={model.max_position_embeddings} must be seq_length={length} with {memory}: it "
            "says where segments begin; drop it"
        )
    if kind != "relative":
        return found
    if model.num_kv_heads != model.num_attention_heads:
        found.append(
            f"position_embedding_type=relative has no num_query_groups={model.num_query_groups}; drop it, or use "
            "--position-embedding-type rope"
        )
    for name in ("window_size", "attn_logit_softcapping"):
        if is_given(config, name):
            found.append(
                f"{name} is not there with position_embedding_type=relative; drop it, or use "
                "--position-embedding-type rope"
            )
    needs = "model_family=t5"
    buckets = ("relative_attention_num_buckets", "relative_attention_max_distance")
    return found + [says_nothing(config, name, needs) for name in buckets if is_given(config, name)]


def _layout(config: RunConfig, memory: str) -> list[str]:
    parallel, found = config.parallel, []
    others = "use --tensor-model-parallel-size, or more data-parallel ranks with --zero-stage"
    if parallel.pipeline_model_parallel_size > 1:
        found.append(
            f"pipeline_model_parallel_size={parallel.pipeline_model_parallel_size} does not go with {memory}: stages "
            f"are handed activations alone, and keep nothing from step to step; {others}"
        )
    if parallel.sequence_parallel:
        found.append(
            f"sequence_parallel=true does not go with {memory}: a rank's part of the sample does not follow its part "
            "of the memory; drop --sequence-parallel"
        )
    if config.model.mtp_num_layers:
        found.append(
            f"mtp_num_layers={config.model.mtp_num_layers} does not go with {memory}, which its modules lack; drop one "
            "of them"
        )
    return found


def _blend(config: RunConfig, name: str) -> BlendSpec | None:
    try:
        return config.data.blend(name)
    except ValueError:  # said already
        return None
