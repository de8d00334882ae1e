"""ELECTRA in transformers, where discriminator and generator are two models of two classes, each with embeddings."""

import re
from collections.abc import Mapping

from megalm.config.generator import generator_of
from megalm.config.model import ModelConfig
from megalm.models.bert.hugging_face import BERT_LAYER, BERT_OUTSIDE, POSITIONS, EncoderNames
from megalm.models.contract import Part, whole_model

_GENERATOR = "ElectraForMaskedLM"
"""A class of the family `bert`."""
NAMES: Mapping[str, EncoderNames] = {
    "ElectraForPreTraining": EncoderNames(
        prefix="electra",
        layer="encoder.layer",
        outside={**BERT_OUTSIDE, "embeddings_project": ("projection",)},
        inside=BERT_LAYER,
        heads={
            "discriminator_predictions.dense": ("detector.dense",),
            "discriminator_predictions.dense_prediction": ("detector.classifier",),
        },
        ignored=(POSITIONS,),
    ),
}
"""Class of transformers -> its names."""


def part(config: ModelConfig, architecture: str | None) -> Part:
    """The discriminator, or for the class of generators that, with the embeddings of both."""
    if not config.generator_layers:
        return whole_model(config, architecture)
    if architecture == _GENERATOR:
        return Part(generator_of(config), _in_generator)
    alone = {"rtd_generator_size": 0.0, "untie_embeddings_and_output_weights": False}
    first = config.generator_layers
    return Part(
        config.model_copy(update=alone),
        lambda name: re.sub(r"^layers\.(\d+)", lambda found: f"layers.{int(found[1]) + first}", name),
    )


def _in_generator(name: str) -> str:
    """The name of a parameter of `Bert`."""
    if name.startswith("embedding.projection."):
        return name.replace("embedding", "generator", 1)
    return name if name.startswith(("embedding.", "layers.")) else f"generator.{name}"
