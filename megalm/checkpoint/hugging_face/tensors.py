"""Which tensors a model has on both sides: its parameters, and the tensors of transformers that they make up."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from megalm.config.model import ModelConfig
from megalm.errors import CheckpointError
from megalm.models.families import FAMILIES
from megalm.models.foreign import ForeignNames, ForeignTensor, Shape


@dataclass(frozen=True)
class Correspondence:
    """One model as a class of transformers."""

    names: ForeignNames
    shapes: dict[str, Shape]
    """Of our parameters, without vocabulary padding."""
    tensors: dict[str, ForeignTensor]
    """transformers' tensors, by name."""

    @classmethod
    def of(cls, config: ModelConfig, architecture: str) -> "Correspondence":
        """That of a model; its parameters are made up by `architecture`'s tensors, each by one.

        Raises:
            CheckpointError: parameters that no tensor of the class holds.
        """
        family = FAMILIES[config.model_family]
        with torch.device("meta"):
            model = family.build(config, config.vocab_size)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        names = family.hugging_face[architecture]
        tensors = {tensor.name: tensor for tensor in names.tensors(config) if set(tensor.ours) <= set(shapes)}
        left = set(shapes) - {name for tensor in tensors.values() for name in tensor.ours}
        if left:
            raise CheckpointError(f"{architecture} has no place for {', '.join(sorted(left)[:5])}")
        return cls(names, shapes, tensors)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor of transformers."""
        tensor = self.tensors[name]
        return tensor.layout.shape([self.shapes[own] for own in tensor.ours])


def in_shards(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """Names in order, in runs of at most `most` bytes together, or one larger alone."""
    names: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if names and filled + size > most:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names
