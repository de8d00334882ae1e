"""`megalm convert`: models of Hugging Face's transformers into run folders, and back."""

import argparse
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint.hugging_face import HuggingFaceReader, export_model, import_model
from megalm.checkpoint.hugging_face.folder import CONFIG, read_json
from megalm.checkpoint.reader import CheckpointReader
from megalm.commands.generate import load_model, open_checkpoint, tokenizer_of
from megalm.config.data import TokenizerConfig
from megalm.config.hugging_face import ARCHITECTURES, read_folder
from megalm.config.paths import path_argument
from megalm.data.tokenizers import Tokenizer
from megalm.data.tokenizers.export import hugging_face_files
from megalm.models.contract import LanguageModel
from megalm.models.generation import Piece

_CHECKED_TOKENS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two directions and their flags."""
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    from_hf = directions.add_parser("from-hf", help="a model folder of transformers into a new run folder")
    from_hf.add_argument(
        "folder", type=path_argument, metavar="DIR", help="what save_pretrained wrote: config.json and safetensors"
    )
    from_hf.add_argument(
        "--save", required=True, type=path_argument, metavar="RUN", help="new run folder; its step_0 holds the weights"
    )
    from_hf.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read pytorch_model.bin where there are no safetensors: tensors alone, nothing in it is run",
    )
    to_hf = directions.add_parser("to-hf", help="a checkpoint into a new model folder of transformers")
    to_hf.add_argument("run", type=path_argument, metavar="RUN", help="run folder, or one of its step_N folders")
    to_hf.add_argument("folder", type=path_argument, metavar="DIR", help="new folder for from_pretrained")
    to_hf.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the weights (default: that of the model that the run began as, or that it computed in)",
    )
    to_hf.add_argument(
        "--architecture", choices=tuple(ARCHITECTURES), help="class of transformers (default: told from the model)"
    )
    for direction in (from_hf, to_hf):
        direction.add_argument("--no-check", action="store_true", help="do not load the result with transformers")


def run(arguments: argparse.Namespace) -> int:
    """Convert, then compare with transformers where that is installed."""
    folder = Path(arguments.folder)
    if arguments.direction == "from-hf":
        _from_hf(folder, Path(arguments.save), arguments.allow_pickle)
    else:
        _to_hf(arguments.run, folder, arguments.dtype, arguments.architecture)
    if not arguments.no_check:
        is_import = arguments.direction == "from-hf"
        converted = open_checkpoint(arguments.save) if is_import else HuggingFaceReader(folder)
        print(_comparison(folder, load_model(converted)))
    return 0


def _from_hf(folder: Path, run_folder: Path, allow_pickle: bool) -> None:
    reader = import_model(folder, run_folder, allow_pickle=allow_pickle)
    print(f"{folder} ({reader.architecture}, {reader.dtype}) is now {run_folder}/step_0")


def _to_hf(run_folder: str, folder: Path, dtype: str | None, architecture: str | None) -> None:
    reader = open_checkpoint(run_folder)
    tokenizer = _tokenizer(reader)
    special = tokenizer.special_ids if tokenizer is not None else {}
    files = {} if tokenizer is None else hugging_face_files(tokenizer)
    name = export_model(reader, folder, dtype=dtype, architecture=architecture, special_ids=special, files=files)
    print(f"{reader.folder} is now {folder} ({name})")
    if tokenizer is not None and not files:
        print(f"without a tokenizer: transformers has none like {type(tokenizer).__name__}")


def _settings(reader: CheckpointReader) -> TokenizerConfig:
    return TokenizerConfig(**reader.manifest.config["tokenizer"])


def _tokenizer(reader: CheckpointReader) -> Tokenizer | None:
    return tokenizer_of(reader) if _settings(reader).is_given else None


@torch.no_grad()
def _comparison(folder: Path, model: LanguageModel) -> str:
    """How far our logits are from those of transformers' model in `folder`, on random tokens, in fp32."""
    try:
        import transformers
    except ImportError:
        return "not compared with transformers, which is not installed (pip install transformers)"
    name, _ = read_folder(read_json(folder / CONFIG), folder)
    theirs: Any = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32)
    config = model.config
    assert config.vocab_size is not None, "a built model has a vocabulary"
    length = min(_CHECKED_TOKENS, config.max_position_embeddings or _CHECKED_TOKENS)
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(config.vocab_size, (2, length), generator=generator)
    tokens_BT[tokens_BT == theirs.config.pad_token_id] += 1 if theirs.config.pad_token_id == 0 else -1
    ours, others = {"tokens": tokens_BT}, {"input_ids": tokens_BT}
    if config.encoder_decoder:
        ours["decoder_tokens"] = others["decoder_input_ids"] = tokens_BT[:, : length // 2]
    output = theirs.eval()(**others)
    expected = output.logits if "logits" in output else output.prediction_logits
    found = model.eval()(Piece(ours), wants_logits=True)[..., : config.vocab_size]
    difference = float((found.reshape(expected.shape) - expected).abs().max())
    return (
        f"largest difference from transformers {transformers.__version__}: {difference:.2e} in logits up to "
        f"{float(expected.abs().max()):.2f} ({tokens_BT.numel()} random tokens, fp32)"
    )
