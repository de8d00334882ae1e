"""Wrong input ends in one message from one rank, with the fix, a non-zero exit code and no hang."""

import re
from pathlib import Path

import pytest

from megalm.testing.small_runs import Workspace

pytestmark = pytest.mark.e2e

WRONG = {
    # name: flags, exit code, what the message must say (value, rule, fix)
    "missing data": (["--data-path", "/nowhere/corpus"], 3, ["/nowhere/corpus.bin", "megalm preprocess"]),
    "data path with a suffix": (["--data-path", "{corpus}.bin"], 3, ["did you mean {corpus}?"]),
    "empty data": (["--data-path", "{empty}"], 3, ["nothing.idx holds no sequences"]),
    "vocabulary too small for the tokenizer": (["--vocab-size", "500"], 2, ["500", "1000", "drop --vocab-size"]),
    "another tokenizer than the data's, with too few ids too": (
        ["--tokenizer-type", "ByteLevelTokenizer", "--tokenizer-model", "none", "--data-path", "{corpus}"],
        3,
        ["{corpus} was made with tokenizer", "give the same --tokenizer-type"],
    ),
    "sequence longer than positions": (
        ["--max-position-embeddings", "32"],
        2,
        ["seq_length=64", "max_position_embeddings=32", "raise --max-position-embeddings"],
    ),
    "batch that does not divide": (["--micro-batch-size", "3"], 2, ["16", "use 12 or 18"]),
    "unknown tokenizer file": (["--tokenizer-model", "/nowhere/t.model"], 3, ["/nowhere/t.model", "must be a file"]),
    "broken tokenizer file": (["--tokenizer-model", "{recipe}.model"], 3, ["not a sentencepiece model"]),
    "folder that cannot be written": (
        ["--save", "{recipe}/run"],
        4,
        ["cannot write", "choose another folder for --save"],
    ),
    "flag with a typo": (["--train-itters", "5"], 2, ['unknown flag --train-itters; did you mean "--train-iters"']),
    "known flag that is not supported": (["--num-experts", "8"], 2, ["--num-experts", "not supported"]),
    "heads that do not divide": (["--num-attention-heads", "5"], 2, ["5", "hidden_size=64"]),
    "checkpoint that is not there": (["--load", "/nowhere"], 4, ["/nowhere", "no checkpoint"]),
    "Apex where it cannot run": (["--use-apex"], 6, ["--use-apex", "leave --use-apex out"]),
    "context parallelism": (["--context-parallel-size", "2"], 2, ["context_parallel_size=2", "use 1"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_error_from_one_rank(workspace: Workspace, name: str) -> None:
    flags, code, texts = WRONG[name]
    places = {
        "corpus": str(workspace.folder / "corpus_text_document"),
        "recipe": str(workspace.recipe),
        "empty": str(empty_dataset(workspace.folder)),
    }
    Path(f"{workspace.recipe}.model").write_text("this is no model")
    done = workspace.train(*[flag.format(**places) for flag in flags], timeout=60)
    assert done.code == code, done.output
    assert len(done.errors) == 1, done.output
    assert "Traceback" not in done.output
    for text in texts:
        assert text.format(**places) in done.output, done.output


@pytest.mark.long  # srun does in slurm/test_jobs.py
def test_the_launcher_hands_on_the_error_and_its_code(workspace: Workspace) -> None:
    done = workspace.deepspeed("--data-path", "/nowhere/corpus", timeout=120)
    assert (done.code, len(done.errors)) == (3, 1), done.output
    assert "Traceback" not in done.output


def empty_dataset(folder: Path) -> Path:
    """An indexed dataset of no sequences."""
    prefix = folder / "nothing"
    prefix.with_suffix(".bin").write_bytes(b"")
    index = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x08" + (0).to_bytes(8, "little")
    prefix.with_suffix(".idx").write_bytes(index + (1).to_bytes(8, "little") + (0).to_bytes(8, "little"))
    return prefix


def test_all_problems_are_shown_at_once(workspace: Workspace) -> None:
    done = workspace.train(
        "--num-attention-heads", "5", "--train-itters", "9", "--weight-decay", "-1", "--bf16", "--fp16", ranks=None
    )
    assert done.code == 2
    for text in ("num_attention_heads=5", "--train-itters", "weight_decay=-1", "bf16"):
        assert text in done.output
    assert re.search(r"error: \d problems:", done.output)


def test_another_model_in_the_run_folder_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    assert workspace.train("--train-iters", "2", "--eval-iters", "0", "--save", tmp_path, ranks=None).code == 0
    done = workspace.train("--train-iters", "4", "--eval-iters", "0", "--hidden-size", "128", "--save", tmp_path)
    assert done.code == 4, done.output
    assert len(done.errors) == 1, done.output
    assert "model.hidden_size was 64, is 128" in done.errors[0]


def test_a_run_folder_with_checkpoints_but_no_pointer_is_not_started_over(workspace: Workspace, tmp_path: Path) -> None:
    assert workspace.train("--train-iters", "2", "--eval-iters", "0", "--save", tmp_path, ranks=None).code == 0
    (tmp_path / "latest").unlink()
    done = workspace.train("--train-iters", "4", "--eval-iters", "0", "--save", tmp_path, ranks=None)
    assert done.code == 4
    assert "step_2" in done.errors[0]
    assert "--fresh" in done.errors[0]
