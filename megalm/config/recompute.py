"""Which activations are thrown away after the forward pass and computed again in the backward pass."""

from typing import Literal

from pydantic import Field

from megalm.config.base import Section


class RecomputeConfig(Section):
    """Activation recomputation: less memory for more work; results stay equal to the bit."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute whole layers (full), or the attention core, norms and MLP activation (selective). Default: nothing."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full: keep the input of every recompute_num_layers layers (uniform), or recompute the first
    recompute_num_layers layers of each pipeline stage and keep all of the others (block). Default: uniform."""
    recompute_num_layers: int = Field(1, ge=1)
    """With full: layers of one recomputed group (uniform) or recomputed layers of a stage (block)."""

    def problems(self) -> list[str]:
        """Settings of full recomputation without it."""
        if self.recompute_granularity == "full":
            return []
        count = self.recompute_num_layers
        given = {"recompute_method": self.recompute_method, "recompute_num_layers": None if count == 1 else count}
        has = f"recompute_granularity={self.recompute_granularity or 'none'}"
        return [
            f"{name}={value} needs recompute_granularity=full, not {has}; give --recompute-granularity full or drop it"
            for name, value in given.items()
            if value is not None
        ]
