"""Lines for people: the run summary, one progress line per interval, evaluations."""

from typing import Any


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


def duration(seconds: float) -> str:
    """Seconds as 1:02:03."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def summary(title: str, rows: list[tuple[str, str]]) -> str:
    """A titled list of facts, aligned."""
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in rows)])


def count(number: float) -> str:
    """A number as people say it: 12.6M, 1.3B."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:g}"
