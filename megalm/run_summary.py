"""The summary that a run prints at its start: one screen that says what will happen with what."""

from pathlib import Path

import torch

from megalm.config.generator import generator_of
from megalm.config.model import ModelConfig
from megalm.config.rules.loss import cross_entropy_impl, logits_bytes
from megalm.config.sections import RunConfig
from megalm.data.run_data import RunData
from megalm.data.samples.sample import SampleDataset
from megalm.distributed.context import RankContext
from megalm.engine.engine import Engine
from megalm.engine.lr_schedule import learning_rate
from megalm.kernels.building import library
from megalm.models.families import FAMILIES
from megalm.monitor.tables import count, gigabytes, summary
from megalm.run import Run
from megalm.run_state import Progress


def describe_run(run: Run) -> str:
    """The text of the summary."""
    config, context, engine = run.config, run.context, run.engine
    rows = [
        ("model", _model(config, context.mesh.tp)),
        ("layout", f"{context.mesh}, ZeRO {engine.zero_stage}, {engine.optimizer_name}"),
        *([("stages", engine.runner.stages)] if engine.runner.stages else []),
        ("device", _device(context)),
        ("precision", _precision(config)),
        ("recompute", _recompute(config)),
        ("batch", _batch(run)),
        ("schedule", _schedule(run)),
        ("data", _data(config, run.data)),
        ("kernels", _kernels(config, context)),
        ("loss", _loss(config)),
        *([("teacher", _teacher(config, engine))] if config.distillation.teacher_load else []),
        ("start", _start(run.progress, run.origin, skip_train=config.training.skip_train)),
        ("run folder", config.checkpoint.save or "none: no checkpoint is written (--save DIR)"),
    ]
    return summary("megalm", rows)


def _model(config: RunConfig, tensor_parallel_size: int) -> str:
    model = config.model
    family = FAMILIES[model.model_family]
    rows = model.padded_vocab_size(tensor_parallel_size)
    flops = family.training_flops_per_token(model, config.batch.seq_length, rows)
    names = {"relu": "ReLU", "squared_relu": "squared ReLU"}
    inner = names.get(model.activation, "GELU")
    activation = "SwiGLU" if model.swiglu else "GeGLU" if model.gated else inner
    return (
        f"{model.model_family}, {count(family.num_parameters(model))} parameters, "
        f"{_layers(model)} layers x {model.hidden_size}, "
        f"{model.num_attention_heads} heads ({model.num_kv_heads} KV), {activation}, {model.normalization}, "
        f"{model.position_embedding_type}, vocabulary {model.vocab_size} (padded {rows}), "
        f"{count(flops)}FLOP/token"
    )


def _layers(model: ModelConfig) -> str:
    if model.generator_layers:
        return f"{model.generator_layers} x {generator_of(model).hidden_size} and {model.num_layers}"
    return f"{model.num_layers} + {model.decoder_layers}" if model.encoder_decoder else str(model.num_layers)


def _device(context: RankContext) -> str:
    if context.device.type == "cuda":
        return torch.cuda.get_device_name(context.device)
    return f"CPU, {torch.get_num_threads()} threads a rank, gloo"


def _precision(config: RunConfig) -> str:
    dtype = config.precision.dtype
    if dtype == "fp32":
        return "fp32"
    accumulated = "fp32" if config.precision.grad_accum_dtype == "fp32" else dtype
    return f"{dtype}, fp32 master weights, gradients accumulated in {accumulated}"


def _kernels(config: RunConfig, context: RankContext) -> str:
    live = library.load(config.kernels.kernels_backend, context.device.type).reason
    return f"{live}; norms and AdamW of NVIDIA Apex" if config.kernels.use_apex else live


def _loss(config: RunConfig) -> str:
    size = gigabytes(logits_bytes(config))
    if cross_entropy_impl(config) == "linear":
        return f"linear: the logits of a micro-batch ({size}) are computed in parts, twice"
    return f"logits: those of a micro-batch are kept until its backward pass ({size})"


def _teacher(config: RunConfig, engine: Engine) -> str:
    settings, kd = config.distillation, engine.ds_engine.module.distillation
    parameters = FAMILIES[kd.teacher.config.model_family].num_parameters(kd.teacher.config)
    over = "all tokens" if kd.top_k is None else f"its {kd.top_k} likeliest tokens"
    own = ", the objective's own weighs nothing" if kd.skip_lm_loss else ""
    return (
        f"{settings.teacher_load}, {count(parameters)} parameters, frozen; kd_loss x {kd.weight:g} over {over} at "
        f"temperature {kd.temperature:g}{own}"
    )


def _recompute(config: RunConfig) -> str:
    recompute = config.recompute
    if recompute.recompute_granularity is None:
        return "none: all activations are kept"
    if recompute.recompute_granularity == "selective":
        return "selective: norms, attention core and MLP activation"
    return f"full, {recompute.recompute_method or 'uniform'}, {recompute.recompute_num_layers} layers"


def _batch(run: Run) -> str:
    batch, dp = run.config.batch, run.data.size
    size, sizes, total = run.global_batch_size, run.batch_schedule.sizes, run.lengths.total
    from_size = f"{sizes[0]} growing to " if len(sizes) > 1 else ""
    left = 0 if total.name == "train_iters" else int(total.samples) - run.stop_sample
    return (
        f"{from_size}{size} samples = {batch.micro_size} micro x {dp} dp x {batch.accumulation(dp)} accumulated, "
        f"{count(size * batch.seq_length)} tokens a step, {run.total_iters} steps = "
        f"{count(run.stop_sample * batch.seq_length)} tokens"
        + (f"; {left} samples of {total}, less than a step, are left over" if left > 0 else "")
    )


def _schedule(run: Run) -> str:
    """Rates, and the lengths of their phases in samples."""
    optimizer, lengths = run.config.optimizer, run.lengths
    text = f"{optimizer.lr_decay_style} learning rate {optimizer.lr:g}"
    if lengths.warmup:
        text += f", warmup over {lengths.warmup:g} samples"
    if optimizer.lr_decay_style == "constant":
        return text
    text += f", down to {optimizer.min_lr:g} at sample {lengths.decay.samples:g}"
    last = run.lengths.position(run.total_iters, run.stop_sample)
    if learning_rate(last, optimizer, lengths) == 0:
        text += "; the last step has rate 0 (--min-lr)"
        text += ", so this run trains nothing" if run.total_iters == 1 else " and changes nothing"
    return text


def _data(config: RunConfig, data: RunData) -> str:
    if config.data.mock_data:
        return "generated tokens (--mock-data)"
    source = " ".join(config.data.data_path or config.data.train_data_path or ())
    sets: dict[str, SampleDataset | None] = {
        "train": data.train,
        **{f"valid {name}".rstrip(): dataset for name, dataset in data.valid.items()},
        "test": data.test,
    }
    sizes = ", ".join(f"{name} {len(d)} samples" if d else f"{name} none" for name, d in sets.items())
    return f"{source}{_ORDERS[config.data.sampling]}: {sizes}"


_ORDERS = {
    "shuffle": "",
    "stream": " (documents in file order, samples permuted)",
    "consecutive": " (documents in file order, every row of the batch reads on)",
}


def _start(progress: Progress, origin: Path | None, *, skip_train: bool) -> str:
    if origin is None and skip_train:
        return "RANDOM WEIGHTS are evaluated: --skip-train trains nothing, and no checkpoint is loaded (--load)"
    if origin is None:
        return f"from scratch (seed-drawn weights), step {progress.step}"
    return f"from {origin}, step {progress.step}, sample {progress.consumed_samples}"
