"""What a run with a teacher needs, from its settings alone."""

from pathlib import Path

from megalm.config.rules.objective import is_given, says_nothing
from megalm.config.sections import RunConfig

_SETTINGS = ("logit_kl_temperature", "logit_kl_topk", "kd_loss_scale", "skip_lm_loss")


def distillation(config: RunConfig) -> list[str]:
    """A teacher for settings of distillation, and a run in which its logits and the student's meet."""
    load = config.distillation.teacher_load
    if load is None:
        return [says_nothing(config, name, "a teacher (teacher_load)") for name in _SETTINGS if is_given(config, name)]
    return _model(config) + _layout(config) + _teacher(config, load)


def _model(config: RunConfig) -> list[str]:
    found = []
    if config.model.model_family == "electra":
        found.append(
            "teacher_load does not go with model_family=electra, whose discriminator has no distribution over tokens; "
            "distil the generator alone (--model-family bert --objective masked), or drop --teacher-load"
        )
    if config.model.segment_memory is not None:
        found.append(
            f"teacher_load does not go with segment_memory={config.model.segment_memory}: the teacher would remember "
            "nothing of the samples before; drop one of them"
        )
    return found + top_k_problems(config, config.model.vocab_size)


def top_k_problems(config: RunConfig, vocab_size: int | None) -> list[str]:
    """No more tokens are compared than there are; a vocabulary that is not known yet is checked once it is."""
    top_k = config.distillation.logit_kl_topk
    if top_k is None or vocab_size is None or top_k <= vocab_size:
        return []
    return [f"logit_kl_topk={top_k} is more than vocab_size={vocab_size}; use less, or leave it out to compare all"]


def _layout(config: RunConfig) -> list[str]:
    found, stages = [], config.parallel.pipeline_model_parallel_size
    if stages > 1:
        found.append(
            f"pipeline_model_parallel_size={stages} does not go with teacher_load: the last stage would need the "
            "teacher's logits, and to compute these it would hold the whole teacher while the others wait; use "
            "--tensor-model-parallel-size, or more data-parallel ranks with --zero-stage"
        )
    if config.kernels.cross_entropy_fusion_impl == "linear":
        found.append("cross_entropy_fusion_impl=linear holds no logits, which teacher_load compares; drop one of them")
    return found


def _teacher(config: RunConfig, load: str) -> list[str]:
    save = config.checkpoint.save
    if save is None or not Path(load).resolve().is_relative_to(Path(save).resolve()):
        return []
    return [
        f"teacher_load={load} lies in --save {save}, whose checkpoints are the student's; give the folder of another "
        "run"
    ]
