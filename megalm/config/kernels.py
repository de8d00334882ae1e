"""Which implementation of the operators the model calls."""

from typing import Literal

from megalm.config.base import Section


class KernelsConfig(Section):
    """Fused kernels: compiled once for each machine, checked at load; or NVIDIA Apex's."""

    kernels_backend: Literal["auto", "fused", "reference"] = "auto"
    """Operators of the model and the optimizer: fused ones, torch's (reference), or fused where they can be had
    (auto). `megalm kernels build` compiles them ahead of time."""

    cross_entropy_fusion_impl: Literal["auto", "logits", "linear"] = "auto"
    """How the loss comes from the last hidden states: logits keeps all logits of a micro-batch until its backward pass;
    linear computes them a part of the vocabulary at a time, and once more in the backward pass; auto is linear where
    the logits of a micro-batch (its tokens x padded vocabulary / tensor parallel size x 2 or 4 bytes) take more than
    2 GiB."""

    use_apex: bool = False
    """Norms and AdamW of NVIDIA Apex in place of megalm's; it must be installed, with its CUDA extensions, and the
    device a GPU. An offloaded optimizer stays torch's."""
