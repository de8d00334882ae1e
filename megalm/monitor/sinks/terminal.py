"""Lines for people: one progress line per interval, evaluations."""

from typing import Any

from megalm.monitor.tables import duration


def progress_line(row: dict[str, Any], total_iters: int, remaining_s: float) -> str:
    """One line for one logged step, in the order and words of Megatron-LM's log, which people parse."""
    fields = [
        f" iteration {row['step']:8d}/{total_iters:8d}",
        f"consumed samples: {row['consumed_samples']:12d}",
        f"elapsed time per iteration (ms): {1000 * row['iteration_time_s']:.1f}",
        f"learning rate: {row['learning_rate']:.6E}",
        f"global batch size: {row['global_batch_size']:5d}",
        f"lm loss: {row['loss']:.6E}",
        f"loss scale: {row['loss_scale']:.1f}",
        f"grad norm: {row['grad_norm']:.3f}",
        f"number of skipped iterations: {row['skipped_iterations']:3d}",
        f"number of nan iterations: {row['nan_iterations']:3d}",
        f"tokens/s: {row['tokens_per_s']:,.0f}",
        f"ETA: {duration(remaining_s)}",
    ]
    return " | ".join(fields) + " |"


def validation_line(step: int, loss: float, perplexity: float, name: str = "validation") -> str:
    """One line for one evaluation."""
    return f" {name} loss at iteration {step} | lm loss value: {loss:.6E} | lm loss PPL: {perplexity:.6E} |"
