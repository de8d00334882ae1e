"""ELECTRA: a generator that fills in hidden tokens, and a discriminator that tells which of them are not the text's.

Both are encoders and share their embeddings. The layers are numbered through, the generator's first. The stream has
three tensors from the beginning to the end: the residual stream, first the generator's and then the discriminator's;
the generator's losses; and the tokens that are read.

Shapes: B batch, T sequence, D model width, E embedding width, G generator width, V padded vocabulary, N hidden tokens.
Source: Clark et al. 2020, arXiv:2003.10555, sections 2 and 3.2; google-research/electra, run_pretraining.py.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.config.generator import generator_of
from megalm.config.model import ModelConfig
from megalm.errors import ConfigError
from megalm.models.bert.model import EncoderLayer, within_of
from megalm.models.bert.parts import EncoderEmbedding
from megalm.models.blocks.bidirectional import Within
from megalm.models.blocks.embedding import position_ids, vocabulary_sizes
from megalm.models.blocks.loss import weighted_losses
from megalm.models.blocks.randomness import seed_part, seeded_layer
from megalm.models.blocks.rotary import RotaryTables, Tables
from megalm.models.contract import Batch, LanguageModel, LayerStep, Losses, Past, Stream, run_in_order
from megalm.models.electra.parts import Detector, Draw, GeneratorEnds, final_norm, projection


class Electra(LanguageModel):
    """A generator and a discriminator, or with `rtd_generator_size` 0 the discriminator alone.

    The generator reads `tokens` (B, T), and its loss "generator" is the cross entropy of `labels` (B, T) weighted by
    `loss_mask`. At the `hidden_places` (B, T; integers on the host, T where there are no more; default: everywhere) it
    draws tokens from its distribution by the `draw_seed` (B) of each sample, without gradient. The discriminator reads
    `labels` with these in them; alone, it reads `tokens`. Its loss "discriminator" is the binary cross entropy of what
    it reads being other than `labels`, over all positions but those where `padding_mask` (B, T) is False. The loss
    "discriminator_error", which nothing is trained on, is the share of these that it judges wrongly.
    Logits are those of the discriminator, which reads `tokens`. `position_ids`, `token_types`, `cu_seqlens` and
    `padding_mask` are as of `Bert`.
    """

    def __init__(
        self,
        config: ModelConfig,
        padded_vocab_size: int | None = None,
        *,
        layers: Iterable[int] | None = None,
        has_embedding: bool = True,
        has_head: bool = True,
    ) -> None:
        super().__init__()
        assert has_embedding, "checked: this family has no pipeline stages"
        assert has_head, "checked: this family has no pipeline stages"
        vocab_size, rows = vocabulary_sizes(config, padded_vocab_size)
        self.config = config
        self.loss_weights: Mapping[str, float] = _loss_weights(config)
        self.embedding = EncoderEmbedding(config.model_copy(update={"hidden_size": config.embedding_width}), rows)
        self.layer_runner = run_in_order
        first = config.generator_layers
        kinds = {number: (config, number - first) for number in range(first, config.total_layers)}
        if first:
            smaller = generator_of(config)
            self.generator = GeneratorEnds(smaller, vocab_size, rows)
            kinds = {**{number: (smaller, number) for number in range(first)}, **kinds}
        numbers = range(config.total_layers) if layers is None else layers
        self.layers = nn.ModuleDict({str(number): EncoderLayer(*kinds[number]) for number in numbers})
        self.projection = projection(config)
        self.final_norm = final_norm(config)
        self.detector = Detector(config)

    def embed(self, batch: Batch) -> Stream:
        """The stream before the first layer: (B, T, G or D), (B, T), (B, T)."""
        seed_part(self._seed(batch), "embedding")
        tokens_BT = batch["tokens"]
        x_BTE = self._embedded(tokens_BT, batch)
        x_BTD = self.generator.projection(x_BTE) if self._generates(batch) else self.projection(x_BTE)
        return x_BTD, torch.zeros_like(tokens_BT, dtype=torch.float32), tokens_BT

    def run_layers(self, stream: Stream, batch: Batch, cache: Past | None = None) -> Stream:
        """The stream after the layers: of both networks, or where there are no labels of the discriminator.

        Raises:
            ConfigError: with a `cache`: what is stored of a position would change with those after it.
        """
        if cache is not None:
            raise ConfigError(
                f"model_family={self.config.model_family} tells replaced tokens and continues no text; "
                "load a decoder (model_family=gpt)"
            )
        first, generates = self.config.generator_layers, self._generates(batch)
        tables = RotaryTables.of(self.config, position_ids(batch))
        within = within_of(batch, stream[2].device)
        seed, steps = self._seed(batch), []
        for number, layer in ((int(name), layer) for name, layer in self.layers.items()):
            if number < first and not generates:
                continue
            is_windowed = self.config.window_of(number % self.config.num_layers) is not None
            rotary = None if tables is None else tables.of_layer(is_windowed)
            step: LayerStep = partial(_run_layer, layer, rotary, within)
            if number == first and generates:
                step = partial(self._run_replaced, step, batch)
            steps.append(seeded_layer(step, seed, number))
        return self.layer_runner(steps, stream)

    def losses(self, stream: Stream, batch: Batch) -> Losses:
        """The weighted losses of all positions (B, T), float32; cross entropies in nats."""
        x_BTD, generator_losses_BT, read_BT = stream
        scores_BT = self._scores(x_BTD).squeeze(-1)
        is_replaced_BT, weights_BT = read_BT != batch["labels"], _real(batch)
        losses_BT = F.binary_cross_entropy_with_logits(scores_BT, is_replaced_BT.float(), reduction="none")
        errors_BT = (scores_BT.detach() > 0) != is_replaced_BT
        found = {
            "generator": generator_losses_BT,
            "discriminator": weighted_losses(losses_BT, weights_BT),
            "discriminator_error": weighted_losses(errors_BT, weights_BT),
        }
        return {name: found[name] for name in self.loss_weights}

    def counts(self, batch: Batch) -> Losses:
        """The weight of each position (B, T)."""
        real_BT = _real(batch)
        found = {"generator": batch["loss_mask"], "discriminator": real_BT, "discriminator_error": real_BT}
        return {name: found[name] for name in self.loss_weights}

    def logits(self, stream: Stream) -> Tensor:
        """The discriminator's scores (B, T, 1): positive where it holds a token to be replaced."""
        return self._scores(stream[0])

    def stream_shapes(self, rows: int, length: int, parts: int = 1) -> tuple[tuple[int, ...], ...]:
        """Those of the stream of the discriminator; of losses and tokens every rank has all."""
        return (rows, length // parts, self.config.hidden_size), (rows, length), (rows, length)

    def _generates(self, batch: Batch) -> bool:
        """Whether there is what the generator is to fill in."""
        return self.config.generator_layers > 0 and batch.get("labels") is not None

    def _embedded(self, tokens_BT: Tensor, batch: Batch) -> Tensor:
        x_BTE: Tensor = self.embedding(tokens_BT, position_ids(batch), batch.get("token_types"))
        return x_BTE

    def _run_replaced(self, step: LayerStep, batch: Batch, stream: Stream) -> Stream:
        """The discriminator's first layer, after the generator's end and the draw of what it reads."""
        labels_BT = batch["labels"]
        rows_N, places_N = (x.to(labels_BT.device, non_blocking=True) for x in _hidden(batch))
        draw = Draw(rows_N, places_N, batch["draw_seed"][rows_N])
        losses_BT, drawn_N = self.generator(stream[0], self.embedding.tokens, labels_BT, draw)
        read_BT = labels_BT.index_put((rows_N, places_N), drawn_N)
        weighted_BT = weighted_losses(losses_BT, batch["loss_mask"])
        return step((self.projection(self._embedded(read_BT, batch)), weighted_BT, read_BT))

    def _scores(self, x_BTD: Tensor) -> Tensor:
        scores_BT1: Tensor = self.detector(self.final_norm(x_BTD)).float()
        return scores_BT1


def _loss_weights(config: ModelConfig) -> Mapping[str, float]:
    if not config.generator_layers:
        return MappingProxyType({"discriminator": 1.0, "discriminator_error": 0.0})
    return MappingProxyType({"generator": 1.0, "discriminator": config.rtd_loss_weight, "discriminator_error": 0.0})


def _run_layer(layer: nn.Module, rotary: Tables | None, within: Within, stream: Stream) -> Stream:
    x_BTD, *rest = stream
    return layer(x_BTD, rotary=rotary, within=within), *rest


def _hidden(batch: Batch) -> tuple[Tensor, Tensor]:
    """Row and place of each hidden token, on the host."""
    places_BT, (B, T) = batch.get("hidden_places"), batch["tokens"].shape
    if places_BT is None:
        numbers = torch.arange(B * T)
        return numbers // T, numbers % T
    is_there = places_BT < T
    return is_there.nonzero()[:, 0], places_BT[is_there]


def _real(batch: Batch) -> Tensor:
    """1 where there is no padding, (B, T)."""
    mask_BT = batch.get("padding_mask")
    return torch.ones_like(batch["tokens"], dtype=torch.float32) if mask_BT is None else mask_BT.float()
