"""`megalm show-sample`: samples of a run as tables: what its model reads, sees and is to say."""

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalm.config.lengths import Lengths
from megalm.config.merging.load import load
from megalm.config.paths import path_argument
from megalm.config.ranges import Range
from megalm.config.rules.completion import complete_model
from megalm.config.rules.encoder_decoder import T5_HAS
from megalm.config.rules.objective import FAMILY_OF
from megalm.config.sections import RunConfig
from megalm.errors import ConfigError, DataError
from megalm.storage.faults import reason_of

if TYPE_CHECKING:
    from megalm.data.samples.sample import SampleDataset
    from megalm.data.tokenizers import Tokenizer
    from megalm.objectives.base import Transform

TAKES_RUN_FLAGS = True
"""Every flag of a launch script is understood too."""
_SIZES = {
    "num_layers": "1", "hidden_size": "8", "num_attention_heads": "1", "lr": "1", "micro_batch_size": "1",
    "train_iters": "1",
}  # fmt: skip
"""What a run must have and no sample depends on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `megalm show-sample` beside those of a run."""
    parser.add_argument(
        "--set", choices=("train", "valid", "test"), default="train", help="whose samples (default: train)"
    )
    parser.add_argument("--first", type=Range(0), default=0, metavar="N", help="number of the first one (default: 0)")
    parser.add_argument("--samples", type=Range(1), default=1, metavar="N", help="how many (default: 1)")
    parser.add_argument(
        "--text", action="append", metavar="TEXT", help="of this text in place of the run's data; repeatable: documents"
    )
    parser.add_argument("--html", type=path_argument, metavar="FILE", help="write a page in place of text")
    parser.epilog = (
        "All flags of the launch scripts are understood: --config RUN/config.yaml shows a run's samples. Without "
        "--config a model's sizes need not be given."
    )


def run(arguments: argparse.Namespace, run_flags: list[str]) -> int:
    """Print the samples, or write the page; 0."""
    from megalm.data.tokenizers import open_tokenizer
    from megalm.objectives import build_objective
    from megalm.objectives.table import PAGE, Words, tables
    from megalm.tables import import_modules

    flags = [*run_flags, *(["--mock-data"] if arguments.text else [])]
    config = load(flags, "megalm show-sample", _defaults(run_flags)).on_ranks(1)
    import_modules(config.extensions.import_module)
    tokenizer = open_tokenizer(config.tokenizer)
    config = config.model_copy(update={"model": complete_model(config, tokenizer.vocab_size if tokenizer else None)})
    objective = build_objective(config, tokenizer)
    dataset = (
        _texts(arguments.text, config, tokenizer, objective)
        if arguments.text
        else _dataset(arguments, config, tokenizer, objective)
    )
    objective = _with_documents(objective, dataset)
    words = Words(tokenizer.decode if tokenizer else None, tokenizer.special_ids if tokenizer else {})
    found = []
    names = tuple(config.training.objectives)
    for number in range(arguments.first, arguments.first + arguments.samples):
        row = objective(dataset[number])
        name = names[int(row["objective_id"])] if len(names) > 1 else names[0]
        found += tables(row, words, causal=config.model.model_family == "gpt", title=f"sample {number}, {name}")
    if arguments.html is None:
        print("\n\n".join(map(str, found)))
        return 0
    try:
        Path(arguments.html).write_text(PAGE + "".join(table.html() for table in found), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {arguments.html} cannot be written: {reason_of(error, arguments.html)}") from error
    print(f"wrote {arguments.html}")
    return 0


def _defaults(flags: Sequence[str]) -> dict[str, str]:
    """What need not be given without a recipe: sizes, and the family that the objective trains."""
    words = [part for flag in flags for part in flag.split("=", 1)]
    if "--config" in words:
        return {}
    given = dict(pairwise(words))
    named = given.get("--objective-mixture") or given.get("--objective") or "causal"
    family = given.get("--model-family") or FAMILY_OF.get(named.split(":")[0], "gpt")
    own = {name: str(value).lower() if value is True else value for name, value in T5_HAS.items()}
    of_family = {"t5": own, "electra": {"rtd_generator_size": "1"}}  # the one head is no multiple of another
    return _SIZES | {"model_family": family} | of_family.get(family, {})


def _dataset(
    arguments: argparse.Namespace, config: RunConfig, tokenizer: "Tokenizer | None", objective: "Transform"
) -> "SampleDataset":
    """The run's samples; those of training as a run on one rank numbers them.

    Raises:
        DataError: there are fewer, or as the run itself.
    """
    from megalm.data.run_data import RunData

    _, samples = Lengths.of(config, config.batch.global_size(1)).end(config.batch.schedule(1))
    data = RunData.build(
        config, tokenizer, objective, rank=0, size=1, pin_memory=False, trained_samples=samples, record=None
    )
    sets = {"train": data.train, "valid": next(iter(data.valid.values()), None), "test": data.test}
    found, stop = sets[arguments.set], arguments.first + arguments.samples
    if found is None or len(found) < stop:
        raise DataError(
            f"samples {arguments.first} .. {stop - 1} of the {arguments.set} set are wanted, and it has "
            f"{0 if found is None else len(found)}; give another --first, --samples or --set"
        )
    return found


def _with_documents(objective: "Transform", dataset: Any) -> "Transform":
    from megalm.objectives.base import UsesDocuments

    if isinstance(objective, UsesDocuments) and objective.needs_documents:
        return objective.with_documents(dataset)
    return objective


def _texts(texts: Sequence[str], config: RunConfig, tokenizer: "Tokenizer | None", objective: "Transform") -> Any:
    """The same sample of these texts under every number.

    Raises:
        ConfigError: there is no tokenizer.
    """
    from megalm.data.samples.texts import TextSamples

    if tokenizer is None:
        raise ConfigError(
            "--text needs a tokenizer; give --tokenizer-model FILE or --tokenizer-type ByteLevelTokenizer"
        )
    eod = tokenizer.special("eod")
    return TextSamples(
        [tokenizer.encode(text) for text in texts], objective.sample_tokens(config.batch.seq_length), eod
    )
