"""Who holds what: the rank grid, the stages of the pipeline, and each stage's share of the model."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from megalm.config.recompute import RecomputeConfig
from megalm.config.rules.loss import cross_entropy_impl
from megalm.config.sections import RunConfig
from megalm.config.training import OptimizerConfig
from megalm.data.batch import ON_HOST
from megalm.distributed.mesh import Mesh
from megalm.engine.optimizers import OPTIMIZERS
from megalm.kernels.backend import FUSED, REFERENCE, Kernels
from megalm.kernels.building import library
from megalm.models.blocks.head import use_linear_loss
from megalm.models.blocks.operators import use_kernels
from megalm.models.contract import LanguageModel
from megalm.models.dtypes import DTYPES
from megalm.models.families import FAMILIES
from megalm.objectives import build_objective
from megalm.parallel.pipeline.chunks import build_chunks
from megalm.parallel.pipeline.plan import PipelinePlan
from megalm.parallel.pipeline.stage import StageModule
from megalm.parallel.randomness import OwnDropout
from megalm.parallel.recompute import apply_recompute
from megalm.parallel.region import TensorParallel
from megalm.parallel.styles import Shards
from megalm.planner.absent import AbsentRanks, AnyVocabulary
from megalm.planner.activations import FakeRank, FakeStage, KeepGradients
from megalm.planner.repeats import blocks_of, kept_recompute


@dataclass(frozen=True)
class Layout:
    """A run's layout on a number of ranks."""

    config: RunConfig
    mesh: Mesh

    @classmethod
    def of(cls, config: RunConfig, world_size: int) -> "Layout":
        """The layout; `check_layout` has found it possible."""
        return cls(config, Mesh.of_config(config.parallel, world_size))

    @cached_property
    def pipeline(self) -> PipelinePlan:
        """The stages and their layers."""
        return PipelinePlan.of(self.config.parallel, self.config.model, self.config.batch.seq_length)

    @property
    def chunks(self) -> int:
        """Stages of each pipeline rank."""
        return len(self.pipeline.layers) // self.mesh.pp

    @property
    def stage_ranks(self) -> list[int]:
        """The pipeline rank of each stage."""
        ranks = range(self.mesh.pp)
        owner = {stage: rank for rank in ranks for stage in self.pipeline.stages(rank)}
        return [owner[stage] for stage in range(len(self.pipeline.layers))]

    @property
    def rows(self) -> int:
        """Rows of the vocabulary tables of one rank."""
        return self.config.model.padded_vocab_size(self.mesh.tp) // self.mesh.tp

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step on each data-parallel rank."""
        return self.config.batch.accumulation(self.mesh.dp)

    @cached_property
    def _known_chunks(self) -> dict[int, list[tuple[LanguageModel, Shards]]]:
        return {}

    @cached_property
    def kernels(self) -> Kernels:
        """The operators that a run on this machine would use.

        Raises:
            PlatformError: kernels_backend=fused and they cannot be had here.
        """
        return FUSED if library.load(self.config.kernels.kernels_backend).fused else REFERENCE

    def stage_costs(self) -> list[float]:
        """Operations of each stage relative to their mean, output head counted."""
        model = self.config.model
        costs = FAMILIES[model.model_family].part_costs(model, self.config.batch.seq_length, "flops")
        of_stages = costs.of_stages(self.pipeline.layers)
        return [cost * len(of_stages) / sum(of_stages) for cost in of_stages]

    def layers(self, pp_rank: int) -> tuple[int, ...]:
        """The layers of all stages of a pipeline rank."""
        return tuple(number for stage in self.pipeline.stages(pp_rank) for number in self.pipeline.layers[stage])

    def stages(self, pp_rank: int) -> list[StageModule]:
        """What a rank of one pipeline rank holds, on the meta device, built as a run builds it; to be read only."""
        return self._stages(pp_rank, self._read_chunks(pp_rank))

    def _stages(self, pp_rank: int, chunks: list[tuple[LanguageModel, Shards]]) -> list[StageModule]:
        last = len(self.pipeline.layers) - 1
        return [
            StageModule(chunk, number == 0, number == last)
            for number, (chunk, _) in zip(self.pipeline.stages(pp_rank), chunks, strict=True)
        ]

    def summed_gradients(self, pp_rank: int) -> list[tuple[int, int]]:
        """(elements, ranks) of each parameter whose gradient is summed over ranks that hold it for different work."""
        return [
            (parameter.numel(), shards.gradient_groups[name].size())
            for chunk, shards in self._read_chunks(pp_rank)
            for name, parameter in chunk.named_parameters()
            if name in shards.gradient_groups
        ]

    def _read_chunks(self, pp_rank: int) -> list[tuple[LanguageModel, Shards]]:
        """The chunks of a rank, to be read only: built once."""
        if pp_rank not in self._known_chunks:
            self._known_chunks[pp_rank] = self._chunks(pp_rank)
        return self._known_chunks[pp_rank]

    def _chunks(self, pp_rank: int) -> list[tuple[LanguageModel, Shards]]:
        tp, copies = self.mesh.tp, max(1, self.mesh.tp // self.config.model.num_kv_heads)
        tensor_parallel = TensorParallel(
            group=AbsentRanks(tp),
            rank=0,
            size=tp,
            kv_copies=copies,
            kv_group=AbsentRanks(copies),
            sequence_parallel=self.config.parallel.sequence_parallel and tp > 1,
        )
        return build_chunks(self.pipeline, pp_rank, self.config.model, tensor_parallel)

    def fake_rank(self, pp_rank: int, recompute: RecomputeConfig, keep: KeepGradients, bucket: int) -> FakeRank:
        """The rank as what a step's passes can be measured on."""
        config, batch = self.config, self.config.batch
        stages = [self._fake_stage(stage, recompute) for stage in self._stages(pp_rank, self._chunks(pp_rank))]
        sequence_parts = self.mesh.tp if config.parallel.sequence_parallel else 1
        dtype = DTYPES[config.precision.dtype]
        return FakeRank(
            stages=stages,
            fields=_batch_fields(config),
            stream_shapes=stages[0].module.part.stream_shapes(batch.micro_size, batch.seq_length, sequence_parts),
            dtype=dtype,
            gradient_dtype=torch.float32 if config.precision.grad_accum_dtype == "fp32" else dtype,
            keep=keep,
            bucket=bucket,
            memory_shape=self.memory_shape,
        )

    @property
    def memory_shape(self) -> tuple[int, ...] | None:
        """What a layer remembers of the rows of a micro-batch; None without segment recurrence."""
        size = self.config.model.segment_memory
        return None if size is None else (self.config.batch.micro_size, size, self.config.model.hidden_size)

    def _fake_stage(self, stage: StageModule, recompute: RecomputeConfig) -> FakeStage:
        layers = stage.part.layers
        blocks = blocks_of(self.layer_kinds(stage), recompute)
        kept = {number for block in blocks for number in block.layers}
        recompute = kept_recompute(blocks, len(layers), recompute)
        for place, number in enumerate(list(layers)):
            if place not in kept:
                del layers[number]
        use_kernels(stage.part, self.kernels)
        if cross_entropy_impl(self.config) == "linear":
            use_linear_loss(stage.part)
        apply_recompute(stage.part, recompute)
        _without_own_draws(stage)
        return FakeStage(module=stage, blocks=blocks)

    def layer_kinds(self, stage: StageModule) -> tuple[Hashable, ...]:
        """One value for each layer of a stage, the same for layers that take the same."""
        model = self.config.model
        # the last of an encoder has its norm behind it, the first of a discriminator the generator's end before it
        marked = model.num_layers - 1 if model.encoder_decoder else model.generator_layers or None
        kinds = []
        for name, layer in stage.part.layers.items():
            number = int(name)
            window = model.window_of(number % model.num_layers if model.generator_layers else number)
            kinds.append((type(layer).__name__, window, number == marked, number < model.generator_layers))
        return tuple(kinds)


def _batch_fields(config: RunConfig) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of each tensor of a micro-batch, but for those whose values decide on shapes."""
    objective = build_objective(config, AnyVocabulary())
    return {
        name: ((config.batch.micro_size, *field.shape), getattr(torch, field.dtype_name))
        for name, field in objective.fields(config.batch.seq_length).items()
        if name not in ON_HOST
    }


def _without_own_draws(stage: StageModule) -> None:
    """Let attention's dropout draw as the rest does: fake tensors have no number to seed a generator with."""
    for name, module in list(stage.named_modules()):
        if isinstance(module, OwnDropout):
            stage.set_submodule(name, module.core, strict=True)


def parameter_sizes(stages: Sequence[StageModule]) -> list[int]:
    """Elements of each parameter of a rank that holds `stages`."""
    return [parameter.numel() for parameter in nn.ModuleList(stages).parameters()]


def optimizer_state_sizes(stages: Sequence[StageModule], config: OptimizerConfig) -> list[int]:
    """fp32 elements that the optimizer keeps of each parameter of a rank that holds `stages`."""
    names = {parameter: name for stage in stages for name, parameter in stage.part.named_parameters()}
    kinds = OPTIMIZERS[config.optimizer].state_kinds
    return [parameter.numel() * len(kinds(name, tuple(parameter.shape))) for parameter, name in names.items()]


def parameters(stages: Sequence[StageModule]) -> int:
    """Parameters of a rank that holds `stages`."""
    return sum(parameter_sizes(stages))
