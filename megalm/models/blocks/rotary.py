"""Rotary positions as a configuration asks for them: which frequencies, scaled how, in which layers.

Shapes: B batch, T sequence, R rotary width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megalm.config.model import ModelConfig
from megalm.kernels.rotary import rotary_frequencies, rotary_tables

Tables = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class RotaryTables:
    """Cosines and sines, float32 (B or 1, T, R/2) each, for the layers of one micro-batch."""

    all: Tables
    local: Tables
    """For layers with a window."""

    @classmethod
    def of(cls, config: ModelConfig, position_ids_BT: Tensor) -> "RotaryTables | None":
        """The tables of these positions; None for a model without rotary positions."""
        if config.position_embedding_type != "rope":
            return None
        tables = _tables(config, position_ids_BT)
        if config.rotary_base_local is None:
            return cls(tables, tables)
        return cls(tables, rotary_tables(position_ids_BT, config.rotary_dim, config.rotary_base_local))

    def of_layer(self, windowed: bool) -> Tables:
        """Those of a layer with a window, or of one without."""
        return self.local if windowed else self.all


def _tables(config: ModelConfig, position_ids_BT: Tensor) -> Tables:
    if config.rope_scaling == "none":
        factor = config.rotary_seq_len_interpolation_factor
        return rotary_tables(position_ids_BT, config.rotary_dim, config.rotary_base, factor)
    frequencies = rotary_frequencies(config.rotary_dim, config.rotary_base, position_ids_BT.device)
    if config.rope_scaling == "llama3":
        frequencies, magnitude = llama3_frequencies(frequencies, config), 1.0
    else:
        frequencies, magnitude = yarn_frequencies(frequencies, config), _yarn_magnitude(config)
    angles = position_ids_BT[..., None].float() * frequencies
    return angles.cos() * magnitude, angles.sin() * magnitude


def llama3_frequencies(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """Low frequencies divided by the factor, high ones kept, those between interpolated; (R/2,).

    Source: Llama 3.1's `apply_scaling` (github.com/meta-llama/llama-models, models/llama3/model.py).
    """
    turns = frequencies * config.rope_scaling_original_max_position_embeddings / (2 * math.pi)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / config.rope_scaling_factor


def yarn_frequencies(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """Interpolated where a channel turns seldom, kept where it turns often, a ramp between; (R/2,).

    Source: Peng et al. 2023, "YaRN", arXiv:2309.00071, section 3.2.
    """
    first, last = (_channel_of(turns, config) for turns in (config.yarn_beta_fast, config.yarn_beta_slow))
    first, last = max(math.floor(first), 0), min(math.ceil(last), config.rotary_dim - 1)
    channels = torch.arange(len(frequencies), dtype=torch.float32, device=frequencies.device)
    # a ramp of no width is a step (0.001, as the paper's code has it)
    scaled = ((channels - first) / (last - first if last > first else 0.001)).clamp(0.0, 1.0)
    return scaled * frequencies / config.rope_scaling_factor + (1.0 - scaled) * frequencies


def _channel_of(turns: float, config: ModelConfig) -> float:
    """The channel that turns so often over the original length."""
    length = config.rope_scaling_original_max_position_embeddings
    return config.rotary_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rotary_base))


def _yarn_magnitude(config: ModelConfig) -> float:
    if config.yarn_attention_factor is not None:
        return config.yarn_attention_factor
    return 0.1 * math.log(config.rope_scaling_factor) + 1.0
