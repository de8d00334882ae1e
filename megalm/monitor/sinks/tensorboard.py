"""TensorBoard scalars under Megatron-LM's tags, each also over consumed samples ("... vs samples")."""

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

TRAIN_TAGS = {
    "loss": "lm loss",
    "learning_rate": "learning-rate",
    "grad_norm": "grad-norm",
    "global_batch_size": "batch-size",
    "loss_scale": "loss-scale",
    "iteration_time_s": "iteration-time",
    "params_norm": "params-norm",
    "tokens_per_s": "throughput/tokens-per-s",
    "tflops_per_rank": "throughput/model-tflops-per-rank",
    "data_wait_s": "data/wait-s",
    "memory_bytes": "mem-max-allocated-bytes",
}
VALIDATION_TAGS = {"validation_loss": "lm loss validation", "validation_ppl": "lm loss validation ppl"}
_OVER_SAMPLES = {"loss", "learning_rate", "grad_norm", "global_batch_size", "loss_scale", *VALIDATION_TAGS}


class TensorBoard:
    """Writes metric rows (see monitor.metrics) as scalars; what an earlier start wrote past the resume point vanishes.

    The "vs samples" twins are in a folder of their own, since a purge drops all points past one number: step 5 would
    take the samples 8, 16, ... with it.
    """

    def __init__(self, folder: Path, *, resume_step: int, resume_samples: int, queue_size: int) -> None:
        options = {"max_queue": queue_size, "flush_secs": 10}
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1, **options)
        twins = str(folder / "vs_samples")
        self._samples_writer = SummaryWriter(twins, purge_step=resume_samples + 1, **options)

    def write(self, row: dict[str, Any]) -> None:
        """Add one point for each known metric in `row`; "loss/NAME" is the loss of one dataset, tag "lm loss NAME"."""
        tags = TRAIN_TAGS | VALIDATION_TAGS
        for full_name, value in row.items():
            name, _, dataset = full_name.partition("/")
            if name not in tags:
                continue
            tag = f"{tags[name]} {dataset}" if dataset else tags[name]
            self._writer.add_scalar(tag, value, row["step"])
            if name in _OVER_SAMPLES:
                self._samples_writer.add_scalar(f"{tag} vs samples", value, row["consumed_samples"])

    def write_config(self, text: str) -> None:
        """Show the run's configuration in the Text tab."""
        self._writer.add_text("config", "```yaml\n" + text + "\n```")

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Show text in the Text tab."""
        self._writer.add_text(tag, text, step)

    def close(self) -> None:
        """Write what is still queued."""
        self._writer.close()
        self._samples_writer.close()
