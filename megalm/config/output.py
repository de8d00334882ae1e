"""What a run leaves behind, where it starts from, and what it says on the way."""

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from megalm.config.base import MayDiffer, OneShot, OpenChoice, Section, as_list
from megalm.config.paths import InputPath, PathText, path_argument, read_path

HUGGING_FACE = "hf:"
"""What --load has before the folder of a model of transformers."""


def hugging_face_folder(load: str | None) -> Path | None:
    """The model folder of transformers that `hf:DIR` names; None for anything else."""
    return Path(load.removeprefix(HUGGING_FACE)) if load is not None and load.startswith(HUGGING_FACE) else None


def load_argument(text: str) -> str:
    """--load of a command: a path, or `hf:` and a path."""
    folder = hugging_face_folder(text)
    return path_argument(text) if folder is None else HUGGING_FACE + path_argument(str(folder))


def _read_load(value: object) -> object:
    if not isinstance(value, str):
        return value
    marked = value.startswith(HUGGING_FACE)
    return (HUGGING_FACE if marked else "") + read_path(value.removeprefix(HUGGING_FACE))


Load = Annotated[str, BeforeValidator(_read_load)]


class CheckpointConfig(Section):
    """The run folder and where to start from."""

    save: PathText | None = None
    """Run folder: config.yaml, metrics.jsonl, tensorboard/, logs/, step_N/ checkpoints and `latest`. The same command
    continues the run that it finds there."""
    save_interval: int | None = Field(None, ge=1)
    """Steps between two checkpoints. Default: only at the end of the run."""
    load: Annotated[Load | None, InputPath(prefix=HUGGING_FACE)] = None
    """Run folder or step_N folder to start from when --save holds no checkpoint yet; or hf:DIR, a model folder of
    transformers, whose weights, settings and tokenizer the run takes."""
    finetune: bool = False
    """Take only the weights from --load: optimizer, step and sample position start anew."""
    no_load_optim: bool = False
    """Do not load the optimizer state from --load."""
    no_save_optim: bool = False
    """Do not save the optimizer state; such a checkpoint cannot continue a run bit-exactly."""
    fresh: Annotated[bool, OneShot()] = False
    """Start from scratch although --save holds checkpoints; they are kept under another name. The same command goes on
    with the run that it began, where that stopped by itself or by a signal, or is started again by the launcher."""
    keep_checkpoints: int | None = Field(None, ge=1)
    """Number of newest checkpoints to keep. Default: all; 1 with --save-retain-interval or --keep-best-checkpoints."""
    save_retain_interval: int | None = Field(None, ge=1)
    """Keep also the checkpoints whose step is a multiple of this."""
    keep_best_checkpoints: int | None = Field(None, ge=1)
    """Keep also so many of the checkpoints with the lowest validation loss."""


class LoggingConfig(Section):
    """Terminal, metrics.jsonl and TensorBoard."""

    sinks: Annotated[tuple[str, ...], OpenChoice(("terminal", "jsonl", "tensorboard")), BeforeValidator(as_list)] = (
        "terminal",
        "jsonl",
        "tensorboard",
    )
    """Where metrics go. Default: terminal, jsonl (metrics.jsonl in the run folder) and tensorboard."""

    log_interval: int = Field(10, ge=1)
    """Steps between two lines in the terminal and in metrics.jsonl."""
    tensorboard_dir: Annotated[PathText | None, MayDiffer()] = None
    """Folder of the TensorBoard event files. Default: SAVE/tensorboard."""
    tensorboard_log_interval: int = Field(1, ge=1)
    """Steps between two TensorBoard points."""
    tensorboard_queue_size: int = Field(1000, ge=1)
    """TensorBoard points kept in memory before they are written."""
    log_params_norm: bool = False
    """Also log the L2 norm of all parameters."""
