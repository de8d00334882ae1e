"""A run's teacher: found and checked before the run meets its data, then put beside the student."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalm.checkpoint.format import MANIFEST, Manifest, find_checkpoint
from megalm.checkpoint.hugging_face import HuggingFaceReader
from megalm.checkpoint.hugging_face.folder import CONFIG, read_json
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.restore import restore_weights
from megalm.checkpoint.verify import open_together
from megalm.config.hugging_face import read_folder
from megalm.config.model import ModelConfig
from megalm.config.output import hugging_face_folder
from megalm.config.rules.distillation import top_k_problems
from megalm.config.rules.layout import model_split
from megalm.config.rules.run import lengths
from megalm.config.sections import RunConfig
from megalm.distributed.collectives import gather_json, on_all_ranks
from megalm.distributed.context import RankContext
from megalm.distributed.fingerprint import is_finite
from megalm.distributed.shards import ShardSpec
from megalm.engine.state import set_weight
from megalm.errors import CheckpointError, ConfigError
from megalm.kernels.backend import Kernels
from megalm.models.token_model import Distillation, TokenModel
from megalm.parallel.build import RankModel, build_frozen_model
from megalm.storage.durable import sha256_of


@dataclass(frozen=True)
class TeacherFolder:
    """Where a teacher's weights lie, and what is known of it before they are read."""

    folder: Path
    model: ModelConfig
    tokenizer: str | None
    """Identity of the tokenizer that it was trained with; transformers' folders do not tell it."""
    is_hugging_face: bool

    @classmethod
    def find(cls, load: str) -> Self:
        """What --teacher-load names.

        Raises:
            CheckpointError: nothing, or something damaged. ConfigError: a model that is none of megalm's.
        """
        if (folder := hugging_face_folder(load)) is not None:
            return cls(folder, read_folder(read_json(folder / CONFIG), folder)[1], None, True)
        found = find_checkpoint(Path(load), "name one of its step_N folders")
        if found is None:
            raise CheckpointError(
                f"--teacher-load {load} holds no checkpoint (a run folder with `latest`, or a step_N folder); correct "
                "the path, or give hf:DIR for a model folder of transformers"
            )
        manifest = Manifest.read(found)
        return cls(found, manifest.section("model", ModelConfig), manifest.identity.get("tokenizer"), False)

    def beside(self, student: ModelConfig) -> ModelConfig:
        """The teacher's settings, with tables as long as the student's: padding has to be in the same columns."""
        same = ("make_vocab_size_divisible_by", "decoder_seq_length")
        return self.model.model_copy(update={name: getattr(student, name) for name in same})

    def identity(self) -> str:
        """SHA-256 of all that decides what the teacher says."""
        if not self.is_hugging_face:  # a manifest has the hashes of the other files
            return sha256_of(self.folder / MANIFEST)
        files = sorted(path for path in self.folder.iterdir() if path.suffix == ".safetensors" or path.name == CONFIG)
        return hashlib.sha256("".join(sha256_of(path) for path in files).encode()).hexdigest()

    def open(self, wanted: Mapping[str, ShardSpec], device: torch.device) -> CheckpointReader | HuggingFaceReader:
        """The weights, of which this rank is to read `wanted`; every rank calls it."""
        if self.is_hugging_face:
            return on_all_ranks(device, lambda: HuggingFaceReader(self.folder), "opening the teacher")
        return open_together(self.folder, wanted, device)


def find_teacher(config: RunConfig, tokenizer: str | None = None) -> TeacherFolder | None:
    """The run's teacher, None if it has none, checked as far as the run's vocabulary and `tokenizer` are known.

    Raises:
        CheckpointError: there is no teacher there, or it is damaged.
        ConfigError: it cannot teach this run's model.
    """
    load = config.distillation.teacher_load
    if load is None:
        return None
    found = TeacherFolder.find(load)
    if problems := _problems(config, found, tokenizer):
        raise ConfigError([f"teacher_load={load}: {problem}" for problem in problems])
    return found


def _problems(config: RunConfig, found: TeacherFolder, tokenizer: str | None) -> list[str]:
    teacher, student = found.beside(config.model), config.model
    if teacher.model_family != student.model_family:
        return [
            f"the teacher is of model_family={teacher.model_family} and the student of {student.model_family}, which "
            "read other batches; use a teacher of the student's family"
        ]
    problems = top_k_problems(config, teacher.vocab_size)
    if student.vocab_size is not None and teacher.vocab_size != student.vocab_size:
        problems.append(
            f"the teacher's vocabulary has {teacher.vocab_size} tokens and the student's {student.vocab_size}: their "
            "distributions cannot be compared; use a teacher with the student's tokenizer"
        )
    elif tokenizer is not None and found.tokenizer is not None and tokenizer != found.tokenizer:
        problems.append(
            f"the teacher was trained with another tokenizer ({found.tokenizer:.12}, not {tokenizer:.12}), whose ids "
            "mean other tokens; use the teacher's tokenizer, or another teacher"
        )
    if teacher.segment_memory is not None:
        problems.append("the teacher has a memory of the samples before, which it would not get; use another teacher")
    beside = config.model_copy(update={"model": teacher})
    if teacher.position_embedding_type == "learned_absolute":
        problems += lengths(beside)
    return problems + model_split(beside)


def identity_of_teacher(config: RunConfig, tokenizer: str | None, device: torch.device) -> dict[str, str]:
    """What a checkpoint remembers of the teacher, to refuse another on resume; every rank calls it.

    Raises:
        CheckpointError, ConfigError: as `find_teacher`.
    """

    def identity() -> str | None:
        found = find_teacher(config, tokenizer)
        return found.identity() if found is not None and dist.get_rank() == 0 else None

    if config.distillation.teacher_load is None:
        return {}
    return {"teacher": gather_json(on_all_ranks(device, identity, "finding the teacher"), device)[0]}


def with_teacher(model: RankModel, config: RunConfig, context: RankContext, kernels: Kernels) -> RankModel:
    """The student `model`, with the run's teacher beside it, if it has one; every rank calls it.

    Raises:
        CheckpointError, ConfigError: as `find_teacher`; the weights are damaged, of another model, or not finite.
    """
    settings, device = config.distillation, context.device
    found = on_all_ranks(device, lambda: find_teacher(config), "finding the teacher") if settings.teacher_load else None
    if found is None:
        return model
    student = model.module
    assert isinstance(student, TokenModel), "the rules of a run leave teachers to whole models with such a head"
    teacher = build_frozen_model(config, found.beside(config.model), context, kernels)
    reader, parameters = found.open(teacher.shard_specs, device), dict(teacher.module.named_parameters())
    names = {parameter: name for name, parameter in parameters.items()}

    def set_finite(parameter: nn.Parameter, part: Tensor) -> None:
        if not is_finite(part):
            raise CheckpointError(f"{found.folder} holds weights that are not finite ({names[parameter]})")
        set_weight(parameter, teacher.shard_specs[names[parameter]], part)

    def load() -> None:
        restore_weights(reader, parameters, teacher.shard_specs, set_finite)

    on_all_ranks(device, load, "loading the teacher")
    assert isinstance(teacher.module, TokenModel), "it is of the student's family"
    student.learn_from(
        Distillation(
            teacher=teacher.module,
            temperature=settings.logit_kl_temperature,
            top_k=settings.logit_kl_topk,
            weight=settings.kd_loss_scale,
            skip_lm_loss=settings.skip_lm_loss,
        )
    )
    return model
