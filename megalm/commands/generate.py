"""`megalm generate`: text from a checkpoint, on one process."""

import argparse
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint.format import find_checkpoint
from megalm.checkpoint.hugging_face import HuggingFaceReader
from megalm.checkpoint.reader import CheckpointReader
from megalm.config.data import TokenizerConfig
from megalm.config.output import hugging_face_folder, load_argument
from megalm.config.paths import path_argument
from megalm.config.ranges import LARGEST_SEED, Range
from megalm.config.spans import SENTINELS, SequenceIds
from megalm.data.tokenizers import Tokenizer, build_tokenizer
from megalm.errors import CheckpointError, ConfigError
from megalm.models.contract import LanguageModel
from megalm.models.families import FAMILIES
from megalm.models.generation import generate
from megalm.tables import import_modules

WeightsReader = CheckpointReader | HuggingFaceReader


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `megalm generate`."""
    parser.add_argument(
        "--load",
        required=True,
        type=load_argument,
        metavar="RUN",
        help="run folder, one of its step_N folders, or hf:DIR, a model of transformers",
    )
    parser.add_argument(
        "--prompt",
        default="",
        help="text to continue, or for an encoder to read; empty: a new document",
    )
    parser.add_argument(
        "--max-new-tokens", type=Range(1), metavar="N", help="most tokens to add (default 128, or what fits)"
    )
    parser.add_argument(
        "--temperature", type=Range(0, 1e6, whole=False), default=0.8, help="0 takes the likeliest token (0.8)"
    )
    parser.add_argument(
        "--top-k", type=Range(0), default=0, metavar="K", help="sample from the K likeliest only; 0: all"
    )
    parser.add_argument(
        "--top-p",
        type=Range(1e-6, 1, whole=False),
        default=0.95,
        help="... and from the likeliest that reach this probability",
    )
    parser.add_argument(
        "--num-samples", type=Range(1), default=1, metavar="N", help="continuations to write (default 1)"
    )
    parser.add_argument(
        "--seed", type=Range(0, LARGEST_SEED), default=1234, help="the same seed gives the same text (default 1234)"
    )
    parser.add_argument(
        "--tokenizer-model", type=path_argument, metavar="FILE", help="tokenizer file, if it moved since the training"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the prompt with each continuation."""
    reader = open_weights(arguments.load)
    tokenizer = tokenizer_of(reader, arguments.tokenizer_model)
    texts = sample_text(
        load_model(reader),
        tokenizer,
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens or 0,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        num_samples=arguments.num_samples,
        seed=arguments.seed,
    )
    for number, text in enumerate(texts, 1):
        if len(texts) > 1:
            print(f"--- sample {number} ---")
        print(text)
    return 0


def open_checkpoint(path: str) -> CheckpointReader:
    """The checkpoint that a run folder or a step folder offers.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    folder = find_checkpoint(Path(path), "load one of its step_N folders")
    if folder is None:
        raise CheckpointError(
            f"--load {path} holds no checkpoint; give a run folder (--save of the training) or one of its step_N "
            "folders"
        )
    reader = CheckpointReader(folder)
    import_modules(reader.manifest.config.get("extensions", {}).get("import_module", ()))
    return reader


def open_weights(path: str) -> WeightsReader:
    """A run folder, a step folder, or with `hf:` before it a model folder of transformers.

    Raises:
        CheckpointError: there is none, or it is damaged. ConfigError: transformers' model is none of ours.
    """
    folder = hugging_face_folder(path)
    return open_checkpoint(path) if folder is None else HuggingFaceReader(folder)


def load_model(reader: WeightsReader) -> LanguageModel:
    """The one-device model with the checkpoint's weights, fp32.

    Raises:
        CheckpointError: its settings are not those of its tensors.
    """
    config = reader.model_config
    with torch.device("meta"):
        model = FAMILIES[config.model_family].build(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in reader.names or reader.shape(name)[1:] != tuple(parameter.shape)[1:]:
                found = reader.shape(name) if name in reader.names else "nothing"
                raise CheckpointError(
                    f"{reader.folder} holds {found} of {name}, and its settings ask for {tuple(parameter.shape)}; "
                    "load another step"
                )
            rows = reader.read_tensor(name)  # a vocabulary table has padding here that the checkpoint may lack
            parameter.zero_()[: rows.shape[0]] = rows
    return model


def tokenizer_of(reader: WeightsReader, moved_to: str | None = None) -> Tokenizer:
    """The tokenizer that the model was trained with.

    Raises:
        ConfigError: the run had none.
        DataError: its file is missing. CheckpointError: the file is another one.
    """
    if isinstance(reader, HuggingFaceReader):
        return build_tokenizer(TokenizerConfig(tokenizer_model=moved_to or str(reader.folder)))
    settings = reader.manifest.section("tokenizer", TokenizerConfig)
    if moved_to is not None:
        settings = settings.model_copy(update={"tokenizer_model": moved_to})
    if not settings.is_given:
        raise ConfigError(
            f"the run of {reader.folder} was trained without a tokenizer; `megalm generate` takes one: "
            "--tokenizer-model FILE"
        )
    tokenizer = build_tokenizer(settings)
    trained_with = reader.manifest.identity.get("tokenizer")
    if trained_with is not None and trained_with != tokenizer.identity:
        raise CheckpointError(
            f"{settings.tokenizer_model} is not the tokenizer that {reader.folder} was trained with; "
            "give the right one with --tokenizer-model"
        )
    return tokenizer


def sample_text(
    model: LanguageModel, tokenizer: Tokenizer, prompt: str, *, num_samples: int, max_new_tokens: int, **options: Any
) -> list[str]:
    """The prompt with each of its continuations, as text; `options` are those of `models.generation.generate`.

    `max_new_tokens` 0 is 128, or as many as learned positions leave. Of an encoder-decoder the texts are what the
    decoder writes of the prompt, with the names of its sentinels.

    Raises:
        ConfigError: no prompt, and the tokenizer has no end-of-document token that could begin a text.
    """
    if model.config.encoder_decoder:
        return _written_text(model, tokenizer, prompt, num_samples, max_new_tokens or 128, options)
    tokens, eod = tokenizer.encode(prompt), tokenizer.special("eod")
    if not tokens:
        if eod is None:
            raise ConfigError("the tokenizer has no end-of-document token to begin with; give --prompt TEXT")
        tokens = [eod]
    if not max_new_tokens:
        learned = model.config.position_embedding_type == "learned_absolute"
        room = (model.config.max_position_embeddings or 0) - len(tokens)
        max_new_tokens = max(1, min(128, room)) if learned else 128
    continuations = generate(model, tokens, max_new_tokens, num_samples=num_samples, stop_token=eod, **options)
    kept = [[token for token in new if token != eod] for new in continuations]
    return [tokenizer.decode((tokens if prompt else []) + new) for new in kept]


def _written_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    num_samples: int,
    max_new_tokens: int,
    options: dict[str, Any],
) -> list[str]:
    """What an encoder-decoder writes of a prompt, in as many samples."""
    ids = SequenceIds.of(tokenizer.special_ids)
    tokens = read_tokens(tokenizer, ids, prompt)
    if len(tokens) == 1:
        raise ConfigError("an encoder-decoder writes of what it reads; give --prompt TEXT")
    around = {"start_token": ids.start, "stop_token": ids.end}
    written = generate(model, tokens, max_new_tokens, num_samples=num_samples, **around, **options)
    return [written_text(tokenizer, ids, new) for new in written]


def read_tokens(tokenizer: Tokenizer, ids: SequenceIds, prompt: str) -> list[int]:
    """What an encoder reads of a prompt: its tokens, then the end of text."""
    tokens = tokenizer.encode(prompt)
    return tokens if tokens[-1:] == [ids.end] else [*tokens, ids.end]


def written_text(tokenizer: Tokenizer, ids: SequenceIds, tokens: Sequence[int]) -> str:
    """The text of what a decoder wrote, with the names of its sentinels."""
    names = {number: f" <{name}> " for name, number in tokenizer.special_ids.items() if name in SENTINELS}
    kept = [token for token in tokens if token not in (ids.end, ids.pad)]
    runs = groupby(kept, key=lambda token: names.get(token))
    return "".join(tokenizer.decode(list(run)) if name is None else name * len(list(run)) for name, run in runs).strip()
