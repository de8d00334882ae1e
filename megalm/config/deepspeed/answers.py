"""What megalm does about each key of a DeepSpeed JSON: one of five tables, or a setting of megalm's own (`read.FACTS`).

* REMOVED: DeepSpeed 0.19 has it no more. UNSUPPORTED_JSON: megalm does not do it. Both are refused unless the value
  asks for nothing, and then taken out.
* NO_EFFECT_JSON: what it asks for is always so, or there is nothing here that it could change. Taken out, and said.
* HANDED: DeepSpeed gets it, at the ZeRO stages that read it. Tests train, save, load elsewhere and evaluate with each.

docs/configuration.md shows these tables (`merging.reference`).
"""

from dataclasses import dataclass, replace
from typing import Any

REMOVED = {
    "nebula": "megalm's checkpoints (--save) are complete or absent without it",
    "compression_training": "there is no replacement",
    "amp": 'use --bf16 or --fp16 ("bf16": {"enabled": "auto"})',
    "quantize_training": "there is no replacement",
    "sparse_gradients": "embedding gradients are dense; there is no replacement",
    "eigenvalue": "there is no replacement",
    "sparse_attention": "there is no replacement",
    "elasticity": "the same command continues a run on another number of ranks; use --global-batch-size",
    "graph_harvesting": "there is no replacement",
    "curriculum_learning": "all samples of megalm are full-length; there is no replacement",
    "progressive_layer_drop": "there is no replacement",
    "zero_optimization.mics_shard_size": "there is no replacement",
    "zero_optimization.mics_hierarchical_params_gather": "there is no replacement",
    "zero_optimization.zeropp_loco_param": "there is no replacement",
}
"""Keys that DeepSpeed 0.19 removed and refuses: the replacement."""

_MONITOR = "results go to metrics.jsonl and TensorBoard (--tensorboard-dir) only"
_MASTERS = "megalm keeps fp32 master weights and optimizer states, also in its checkpoints"
_RECOMPUTE = "what is recomputed is kept whole on its device; use --recompute-granularity and remove the key"
_PIPELINE = "use --pipeline-model-parallel-size, --pipeline-layout and --recompute-granularity"
_TENSOR = "megalm's own layers are tensor-parallel, of them only autotp_size is a setting"
_MOE = "mixture-of-experts models are not available in this version"
_QUANTIZED = "a step would compute with weights or gradients in 8 bits, in kernels that DeepSpeed has for CUDA only"
_NEIGHBOURS = "DeepSpeed takes ranks of neighbouring numbers for it, which need not hold the same weights here"
_LEAVES = "leaf modules are for mixture-of-experts layers, which are not available in this version"
_MEAN = "megalm divides the loss for a mean over ranks"

UNSUPPORTED_JSON: dict[str, tuple[str, tuple[Any, ...]]] = {
    "optimizer.legacy_fusion": ("megalm builds the optimizer", ()),
    "optimizer.params.adam_w_mode": ("weight decay is always decoupled (AdamW)", (True,)),
    "optimizer.params.bias_correction": ("Adam's bias correction is always on", (True,)),
    "optimizer.params.amsgrad": ("the optimizer is plain AdamW", ()),
    "optimizer.params.max_grad_norm": ('use "gradient_clipping" or --clip-grad', ()),
    "optimizer.params.muon_lr": ("all parameters share --lr; see --muon-extra-scale-factor", ()),
    "optimizer.params.adam_lr": ("all parameters share --lr; see --muon-extra-scale-factor", ()),
    "optimizer.params.ns_method": ("use --muon-coefficient-type and --muon-num-ns-steps", ()),
    "optimizer.params.per_head_muon": ("Muon makes whole matrices orthogonal", ()),
    "optimizer.params.fp32_optimizer_states": (_MASTERS, (True,)),
    "bf16.bf16_master_weights_and_grads": (_MASTERS, ()),
    "bf16.bf16_optimizer_states": (_MASTERS, ()),
    "bf16.check_grad_overflow": ("a step whose gradients are not finite is always skipped", (True,)),
    "fp16.fp16_master_weights_and_grads": (_MASTERS, ()),
    "fp16.auto_cast": ("inputs are token ids", ()),
    "torch_autocast": ("use --bf16 or --fp16", ()),
    "managed_gradient_accumulation": ("DeepSpeed counts the micro-batches", (True,)),
    "gradient_allreduce_op": (_MEAN, ("mean",)),
    "vocabulary_size": ("use --vocab-size and --make-vocab-size-divisible-by", ()),
    "data_types.param_dtype": ("use --bf16 or --fp16", ()),
    "data_types.buffer_dtype": ("use --bf16 or --fp16", ()),
    "data_types.keep_in_fp32_modules": ("megalm's modules choose the type of their buffers", ()),
    "zero_optimization.compute_grad_norm": ("megalm logs the gradient norm", (True,)),
    "zero_optimization.zenflow": ("it changes the number of accumulated micro-batches", ()),
    "zero_optimization.zero_hpz_partition_size": (_NEIGHBOURS, (0, 1)),
    "zero_optimization.leaf_module": (_LEAVES, ()),
    "zero_optimization.stage3_module_granularity_threshold": (_LEAVES, ()),
    "zero_optimization.module_granularity_threshold": (_LEAVES, ()),
    "zero_optimization.offload_optimizer.ratio": ("the optimizer runs as a whole where its state is", (1,)),
    "zero_optimization.zero_quantized_weights": (_QUANTIZED, ()),
    "zero_optimization.zero_quantized_nontrainable_weights": (_QUANTIZED, ()),
    "zero_optimization.zero_quantized_gradients": (_QUANTIZED, ()),
    "zero_optimization.offload_optimizer.super_offload": ("use plain offload_optimizer", ()),
    "activation_checkpointing.partition_activations": (_RECOMPUTE, ()),
    "activation_checkpointing.contiguous_memory_optimization": (_RECOMPUTE, ()),
    "activation_checkpointing.cpu_checkpointing": (_RECOMPUTE, ()),
    "activation_checkpointing.synchronize_checkpoint_boundary": (_RECOMPUTE, ()),
    "activation_checkpointing.profile": (_RECOMPUTE, ()),
    "comms_logger": ("DeepSpeed's own lines are not shown; `megalm plan` says what each axis sends", ()),
    "csv_monitor": (_MONITOR, ()),
    "wandb": (_MONITOR, ()),
    "comet": (_MONITOR, ()),
    "flops_profiler": ("no module is profiled; megalm logs TFLOP/s by the model's formula at every step", ()),
    "autotuning": ("choose --micro-batch-size and --zero-stage yourself", ()),
    "checkpoint.use_node_local_storage": ("all ranks write into one run folder (--save)", ()),
    "checkpoint.writer": ("megalm writes its own checkpoints (--save, --save-interval)", ()),
    "compile": ("DeepSpeed's compiler is not used", ()),
    "data_efficiency": ("megalm orders the samples itself, by --seed, and every layer sees every token", ()),
    "data_parallel_size": ("it is the number of ranks over the sizes of the other axes", ()),
    "datastates_ckpt": ("megalm writes its own checkpoints (--save)", ()),
    "expert_parallel": (_MOE, ()),
    "hybrid_engine": ("it is for generation inside training", ()),
    "pipeline.stages": (_PIPELINE, (1,)),
    "pipeline.partition": (_PIPELINE, ("best",)),
    "pipeline.seed_layers": (_PIPELINE, ()),
    "pipeline.activation_checkpoint_interval": (_PIPELINE, ()),
    "pipeline.use_reentrant": (_PIPELINE, (True,)),
    "scheduler.params.warmup_type": ("the warmup is linear", ("linear", "log")),
    "scheduler.params.warmup_min_ratio": ("use --lr-warmup-init", ()),
    "scheduler.params.cos_min_ratio": ("use --min-lr", ()),
    "sequence_parallel_size": (
        "one sequence is not split over data ranks; use --sequence-parallel",
        (1,),
    ),
    **{
        f"tensor_parallel.{key}": (_TENSOR, ())
        for key in ("tensor_parallel", "tp", "injection_policy_tuple", "partition_config", "preset_model", "dtype")
    },
    **{
        f"tensor_parallel.{key}": (_TENSOR, ())
        for key in ("tp_overlap_comm", "vocab_parallel_lm_head", "keep_module_on_host", "replace_with_kernel_inject")
    },
    "tensor_parallel.kernel_inject": (_TENSOR, ()),
    "tensor_parallel.vocab_parallel_ce_backend": (_TENSOR, ("torch",)),
    "use_data_before_expert_parallelism": (_MOE, ()),
    "weight_quantization": ("it is for inference", ()),
}
"""Keys that megalm does not take: what to do instead, and the values that ask for nothing and are accepted."""

_LINES = "DeepSpeed's own lines are not shown; megalm logs loss, times and memory (--log-interval)"
_NVME = "it is about offload to NVMe, and only offload to the CPU exists"
_OWN_CHECKPOINTS = "megalm writes its own checkpoints, which load under every layout and ZeRO stage"
_BOUNDARY = "what crosses a stage's border is whole where layers are not cut by sequence (--sequence-parallel)"
_INIT = "it is about DeepSpeed's zero.Init, inside which no module of megalm is built"
_FUSED = "AdamW is always fused"

NO_EFFECT_JSON = {
    "steps_per_print": _LINES,
    "wall_clock_breakdown": _LINES,
    "memory_breakdown": _LINES,
    "dump_state": _LINES,
    "log_level": _LINES,
    "timers": _LINES,
    "dataloader_drop_last": "megalm loads the data itself, in whole global batches",
    "disable_allgather": "DeepSpeed reads it nowhere",
    "seq_parallel_communication_data_type": "it is about DeepSpeed's sequence parallelism, which is not used",
    "zero_allow_untested_optimizer": "megalm always allows its own optimizers",
    "zero_force_ds_cpu_optimizer": "the optimizer of offload_optimizer is megalm's, which needs nothing compiled",
    "optimizer.params.torch_adam": _FUSED,
    "optimizer.params.fused": _FUSED,
    "optimizer.params.foreach": _FUSED,
    "optimizer.params.set_grad_none": "gradients are always freed after a step",
    "scheduler.params.last_batch_iteration": "the step comes from the checkpoint",
    "activation_checkpointing.number_checkpoints": "it is about contiguous_memory_optimization, which is not used",
    "aio": _NVME,
    "checkpoint.tag_validation": _OWN_CHECKPOINTS,
    "checkpoint.load_universal": _OWN_CHECKPOINTS,
    "checkpoint.parallel_write": "every rank always writes its own part",
    "pipeline.pipe_partitioned": _BOUNDARY,
    "pipeline.grad_partitioned": _BOUNDARY,
    "zero_optimization.load_from_fp32_weights": _OWN_CHECKPOINTS,
    "zero_optimization.elastic_checkpoint": _OWN_CHECKPOINTS,
    "zero_optimization.pipeline_loading_checkpoint": _OWN_CHECKPOINTS,
    "zero_optimization.gather_16bit_weights_on_model_save": _OWN_CHECKPOINTS,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _OWN_CHECKPOINTS,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _OWN_CHECKPOINTS,
    "zero_optimization.memory_efficient_linear": _INIT,
    "zero_optimization.override_module_apply": _INIT,
    "zero_optimization.legacy_stage1": "DeepSpeed has one implementation of stage 1",
    "zero_optimization.log_trace_cache_warnings": _LINES,
    "zero_optimization.save_muon_momentum_buffer_in_memory": "Muon is megalm's own, without DeepSpeed's buffers",
    **{
        f"zero_optimization.offload_optimizer.{key}": _NVME
        for key in ("nvme_path", "buffer_count", "pipeline_read", "pipeline_write", "fast_init")
    },
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "it is about super_offload, which is not used",
    **{
        f"zero_optimization.offload_param.{key}": _NVME
        for key in ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu")
    },
}
"""Keys that are accepted and change nothing: why."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Where a key that DeepSpeed otherwise gets is refused, and why."""

    why: str
    stages: tuple[int, ...] = (0, 1, 2, 3)
    pipeline: bool = False
    """Only with a pipeline."""
    values: tuple[Any, ...] | None = None
    """Only these values; None: all ..."""
    other_than: tuple[Any, ...] = ()
    """... but these."""

    def concerns(self, value: Any, zero_stage: int, pipeline: bool) -> bool:
        """Whether it refuses a value there."""
        chosen = value not in self.other_than if self.values is None else value in self.values
        return chosen and zero_stage in self.stages and (pipeline or not self.pipeline)


@dataclass(frozen=True, kw_only=True)
class Handed:
    """A key that DeepSpeed gets."""

    stages: tuple[int, ...]
    """ZeRO stages at which it is read; at the others it is left out."""
    tried: tuple[Any, ...]
    """Values that tests train with; the key is to have one that is not the default."""
    least: float | None = None
    """The smallest value."""
    most: float | None = None
    choices: tuple[Any, ...] = ()
    refusals: tuple[Refusal, ...] = ()


_ALL, _SHARDED, _FLAT = (0, 1, 2, 3), (1, 2, 3), (1, 2)
_SCATTERED = Refusal(why="gradients are reduced and scattered as a mean there, at once", stages=(2, 3))
_CPU_ONLY = Refusal(why='only "cpu" is supported', values=("nvme",))


def _stage3(key: str, **rule: Any) -> dict[str, Handed]:
    """A key of stage 3 by both of its names."""
    return {f"zero_optimization.{prefix}{key}": Handed(stages=(3,), **rule) for prefix in ("stage3_", "")}


HANDED: dict[str, Handed] = {
    "communication_data_type": Handed(stages=_SHARDED, choices=("fp32", "fp16", "bf16"), tried=("fp32", "bf16")),
    "prescale_gradients": Handed(stages=(0, 1), tried=(True,), refusals=(replace(_SCATTERED, values=(True,)),)),
    "gradient_predivide_factor": Handed(
        stages=(0, 1), tried=(2.0,), least=1e-6, refusals=(replace(_SCATTERED, other_than=(1, 1.0)),)
    ),
    "disable_python_gc": Handed(stages=_ALL, tried=(True,)),
    "bf16.immediate_grad_update": Handed(
        stages=(1,),
        tried=(False, True),
        refusals=(
            Refusal(
                why="DeepSpeed has no norm for a pipeline stage that keeps no gradient",
                pipeline=True,
                other_than=(False,),
            ),
        ),
    ),
    "fp16.consecutive_hysteresis": Handed(stages=_SHARDED, tried=(True,)),
    "zero_optimization.contiguous_gradients": Handed(stages=_SHARDED, tried=(False,)),
    "zero_optimization.reduce_scatter": Handed(stages=(2, 3), tried=(False,)),
    "zero_optimization.reduce_bucket_size": Handed(stages=_SHARDED, tried=(50,), least=1),
    "zero_optimization.use_multi_rank_bucket_allreduce": Handed(stages=_FLAT, tried=(False,)),
    "zero_optimization.allgather_partitions": Handed(stages=_FLAT, tried=(False,)),
    "zero_optimization.allgather_bucket_size": Handed(stages=_FLAT, tried=(50,), least=2),
    "zero_optimization.overlap_comm": Handed(stages=_SHARDED, tried=(True,)),
    "zero_optimization.ignore_unused_parameters": Handed(stages=_FLAT, tried=(False,)),
    "zero_optimization.round_robin_gradients": Handed(stages=_FLAT, tried=(True,)),
    "zero_optimization.parameter_alignment": Handed(stages=_FLAT, tried=(True,)),
    "zero_optimization.sub_group_size": Handed(stages=(3,), tried=(100,), least=1),
    "zero_optimization.enable_sanity_checks": Handed(
        stages=(3,),
        tried=(True,),
        refusals=(
            Refusal(
                why="DeepSpeed compares all ranks, and pipeline stages do other work",
                pipeline=True,
                other_than=(False,),
            ),
        ),
    ),
    **_stage3("prefetch_bucket_size", tried=(0, 100)),
    **_stage3("param_persistence_threshold", tried=(0, 1_000_000)),
    **_stage3("model_persistence_threshold", tried=(0, 100)),
    **_stage3("max_live_parameters", tried=(0, 100)),
    **_stage3("max_reuse_distance", tried=(0,)),
    **_stage3("use_all_reduce_for_fetch_params", tried=(True,)),
    **_stage3("allgather_sequential", tried=(True,)),
    "zero_optimization.offload_optimizer.device": Handed(stages=_SHARDED, tried=("cpu",), refusals=(_CPU_ONLY,)),
    "zero_optimization.offload_optimizer.pin_memory": Handed(stages=_SHARDED, tried=(True,)),
    "zero_optimization.offload_param.device": Handed(stages=(3,), tried=("cpu",), refusals=(_CPU_ONLY,)),
    "zero_optimization.offload_param.pin_memory": Handed(stages=(3,), tried=(True,)),
}
