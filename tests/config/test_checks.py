"""Rules between settings and the split of ranks and batch; every rule can fail."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.config.merging.load import load_config
from megalm.config.rules.layout import check_layout, layout_problems, nearest_multiples
from megalm.config.sections import RunConfig
from megalm.errors import LayoutError

IN_SAMPLES = "--train-iters none --train-samples 200 --global-batch-size 16 "


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--max-position-embeddings 16", "seq_length=32 must not exceed max_position_embeddings=16"),
        ("--train-samples 80", "train_iters=10 and train_samples=80 both say how long the run is"),
        (
            "--train-iters none",
            "the length of the run is missing; give --train-iters, --train-samples or --train-tokens",
        ),
        ("--min-lr 1", "min_lr=1.0 must not exceed lr=0.001"),
        ("--lr-warmup-init 1", "lr_warmup_init=1.0 must not exceed lr=0.001"),
        ("--lr-warmup-iters 3 --lr-warmup-fraction 0.1", "both say how long the warmup is"),
        ("--lr-warmup-iters 11", "lr_warmup_iters=11 must not exceed train_iters=10"),
        ("--lr-warmup-iters 6 --lr-decay-iters 5", "lr_warmup_iters=6 must not exceed lr_decay_iters=5"),
        (
            "--train-iters none --train-samples 32 --global-batch-size 8 --lr-warmup-iters 100",
            "lr_warmup_iters=100 (800 samples) must not exceed train_samples=32 (32 samples)",
        ),
        (
            "--train-iters none --train-tokens 1024 --global-batch-size 8 --lr-warmup-iters 100",
            "lr_warmup_iters=100 (800 samples) must not exceed train_tokens=1024 (32 samples)",
        ),
        (
            "--train-iters none --train-samples 32 --lr-warmup-tokens 1056",
            "lr_warmup_tokens=1056 (33 samples) must not exceed train_samples=32 (32 samples)",
        ),
        (
            "--global-batch-size 8 --lr-warmup-samples 81",
            "lr_warmup_samples=81 (81 samples) must not exceed train_iters=10 (80 samples)",
        ),
        (
            "--global-batch-size 8 --lr-decay-samples 16 --lr-warmup-iters 3",
            "lr_warmup_iters=3 (24 samples) must not exceed lr_decay_samples=16 (16 samples)",
        ),
        ("--lr-decay-iters 5 --lr-decay-tokens 50", "lr_decay_iters=5 and lr_decay_tokens=50 both say how long the"),
        ("--train-tokens 320", "train_iters=10 and train_tokens=320 both say how long the run is"),
        (
            "--lr-decay-style WSD --lr-warmup-fraction 0.95 --lr-wsd-decay-iters 1",
            "lr_wsd_decay_iters=1 and lr_warmup_fraction=0.95",
        ),
        ("--lr-wsd-decay-samples 2", "lr_wsd_decay_samples=2 needs lr_decay_style=WSD, not linear"),
        ("--decoupled-min-lr 0.1", "decoupled_min_lr=0.1 needs decoupled_lr"),
        ("--decoupled-lr 0.1 --decoupled-min-lr 0.2", "decoupled_min_lr=0.2 must not exceed decoupled_lr=0.1"),
        ("--decoupled-lr 1e-4 --min-lr 2e-4", "min_lr=0.0002 must not exceed decoupled_lr=0.0001"),
        ("--start-weight-decay 0.1", "need a way from one to the other; give --weight-decay-incr-style"),
        ("--weight-decay-incr-style linear --end-weight-decay 0.1", "needs --start-weight-decay and"),
        (
            "--weight-decay-incr-style cosine --start-weight-decay 0.2 --end-weight-decay 0.1",
            "start_weight_decay=0.2 must not exceed end_weight_decay=0.1",
        ),
        ("--rampup-batch-size 4 4 100 --global-batch-size 16", "train_iters=10 does not say how many samples"),
        (IN_SAMPLES + "--rampup-batch-size 4 4", "must be three numbers: START INCREMENT SAMPLES"),
        (IN_SAMPLES + "--rampup-batch-size 4 5 100", "16 - 4 must be a multiple of 5"),
        (IN_SAMPLES + "--rampup-batch-size 20 4 100", "starts above global_batch_size=16"),
        (IN_SAMPLES + "--rampup-batch-size 0 4 100", "at least 1"),
        (
            IN_SAMPLES + "--rampup-batch-size 4 4 100 --gradient-accumulation-steps 2",
            "gradient_accumulation_steps=2 cannot be kept where rampup_batch_size changes the batch",
        ),
        (IN_SAMPLES + "--step-batch-size-schedule 0:8,1K:12", "ends with 12 samples a step, but global_batch_size=16"),
        (IN_SAMPLES + "--step-batch-size-schedule 8", "must be TOKENS:SAMPLES"),
        (IN_SAMPLES + "--step-batch-size-schedule 1K:16", "must begin with the size of the first steps"),
        ("--lr-wsd-decay-iters 2", "lr_wsd_decay_iters=2 needs lr_decay_style=WSD, not linear"),
        (
            "--lr-decay-style WSD --lr-wsd-decay-iters 8 --lr-warmup-iters 3",
            "lr_wsd_decay_iters=8 and lr_warmup_iters=3 must fit into train_iters=10",
        ),
        ("--bf16 --fp16", "exclude each other; add --no-bf16 or --no-fp16 (bf16: --bf16, fp16: --fp16)"),
        ("--loss-scale 8", "loss_scale=8.0 needs fp16=true"),
        ("--fp16 --initial-loss-scale 1000", "initial_loss_scale=1000.0 must be a power of two"),
        ("--fp16 --min-loss-scale 0.5", "min_loss_scale=0.5 must be a whole number"),
        ("--eval-interval 5 --eval-iters 0", "asks for evaluation but eval_iters=0 turns it off"),
        ("--no-mock-data --data-path x --split 1 --eval-interval 5", 'split="1" leaves it no data'),
        ("--no-mock-data --data-path x --split nan,1,0", 'split="nan,1,0" must hold one to three shares'),
        ("--no-mock-data --data-path x --split=-1,1,0", 'split="-1,1,0" must hold one to three shares'),
        ("--no-mock-data --data-path x --split 90,1o,0", 'split="90,1o,0" must hold one to three shares'),
        ("--no-mock-data --train-data-path x --skip-train", "skip_train=true asks for evaluation; give its data"),
        ("--save-interval 5", "save_interval=5 needs a folder; give --save FOLDER"),
        ("--fresh", "fresh=true needs a folder; give --save FOLDER"),
        ("--keep-checkpoints 2", "keep_checkpoints=2 needs a folder"),
        ("--save-retain-interval 2", "save_retain_interval=2 needs a folder"),
        ("--keep-best-checkpoints 2 --save x", "keep_best_checkpoints=2 needs validation losses; give"),
        ("--finetune", "finetune=true needs a folder; give --load FOLDER"),
        ("--no-load-optim", "no_load_optim=true needs a folder; give --load FOLDER"),
        ("--no-deepspeed", "deepspeed=false is not possible"),
        ("--optimizer muon --zero-stage 3", "optimizer=muon needs whole matrices, of which ZeRO stage 3 leaves"),
        ("--optimizer lamb", "optimizer=lamb must be one of adam, lion, muon"),
        ("--context-parallel-size 2", "is not available in this version"),
        ("--num-attention-heads 5", "num_attention_heads=5 must divide hidden_size=64"),
        ("--no-mock-data", "exactly one source of data is needed"),
    ],
)
def test_settings_that_do_not_fit_each_other(problem, flags, expected):
    assert expected in problem(flags)


@pytest.mark.parametrize(
    "flags",
    [
        "--min-lr 0.001",
        "--lr-warmup-iters 10",
        "--lr-warmup-iters 0 --lr-warmup-samples 3 --global-batch-size 8",
        "--lr-warmup-fraction 1",
        "--lr-decay-style WSD --lr-warmup-fraction 0.95",
        "--train-iters none --train-samples 32 --train-tokens 2048 --lr-decay-tokens 900",
        IN_SAMPLES + "--rampup-batch-size 4 4 100",
        IN_SAMPLES + "--rampup-batch-size 16 4 100",
        IN_SAMPLES + "--step-batch-size-schedule 0:8,1K:12,2K:16",
        "--decoupled-lr 5e-4 --weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 0.1",
        "--lr-decay-style WSD --lr-wsd-decay-iters 7 --lr-warmup-iters 3",
        "--max-position-embeddings 32",
        "--train-iters none --train-samples 100 --global-batch-size 16",
        "--no-mock-data --train-data-path x",
        "--no-mock-data --data-path x --split 1",
        "--save x --save-interval 5 --fresh",
        "--fp16 --loss-scale 1000",
    ],
)
def test_settings_at_the_edge_are_fine(load, flags):
    load(flags)


def test_offload_needs_a_stage_that_has_it(problem, write):
    write("ds.json", '{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}')
    assert "offload_param.device=cpu needs zero_stage >= 3, not 2" in problem("--deepspeed_config ds.json")


def test_a_problem_names_where_its_values_were_given(problem, write):
    recipe = write("a.yaml", "optimizer:\n  min_lr: 0.5\n")
    assert problem("--config", recipe).endswith("(min_lr: a.yaml:2, lr: --lr)")


def test_layout_gives_the_data_parallel_size(load):
    assert check_layout(load(), 8) == 8


def test_batch_that_does_not_split_prints_the_equation_and_the_nearest_sizes(load):
    with pytest.raises(LayoutError) as caught:
        check_layout(load("--global-batch-size 20"), 3)
    assert str(caught.value) == (
        "global_batch_size=20 = micro_batch_size=4 x dp 3 x accumulation ? has no solution: "
        "it must be a multiple of 12; use 12 or 24"
    )


def test_accumulation_that_contradicts_the_batch_is_an_error(load):
    with pytest.raises(LayoutError, match="set it to 4"):
        check_layout(load("--global-batch-size 16 --gradient-accumulation-steps 2"), 1)


@pytest.mark.parametrize(
    ("flags", "ranks", "expected"),
    [
        ("--train-samples 7", 2, "train_samples=7 is less than the 8 samples of one step"),
        (
            "--train-samples 32 --lr-warmup-iters 4",
            3,
            r"lr_warmup_iters=4 \(48 samples\) must not exceed train_samples",
        ),
        ("--train-samples 99 --global-batch-size 16 --rampup-batch-size 4 4 50", 2, "a step of 4 samples"),
        ("--train-samples 99 --eval-global-batch-size 12", 2, "eval_global_batch_size=12 = eval_micro_batch_size=4 x"),
    ],
)
def test_lengths_are_checked_with_the_batch_that_the_ranks_give(load, flags, ranks, expected):
    config = load("--train-iters none " + flags)
    assert check_layout(config, 1) == 1
    with pytest.raises(LayoutError, match=expected):
        check_layout(config, ranks)


def with_axes(config: RunConfig, tp: int, pp: int) -> RunConfig:
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=sizes)})


def test_ranks_that_do_not_split_print_the_equation_and_the_nearest_worlds(load):
    found = "\n".join(layout_problems(with_axes(load(), tp=2, pp=3), 8))
    assert "world 8 = tp 2 x pp 3 x dp ? has no solution" in found
    assert "start 6 or 12 ranks, or use --pipeline-model-parallel-size 2" in found
    assert "3 stages need a layer each, but num_layers=2" in found


def test_heads_must_split_over_tensor_parallel_ranks(load):
    def problems(tp, flags=""):
        return "\n".join(layout_problems(with_axes(load(flags), tp=tp, pp=1), tp))

    assert "tensor_model_parallel_size=3 must divide num_attention_heads=4; use 2 or 4" in problems(3)
    six = "--num-attention-heads 12 --kv-channels 8 --num-query-groups 4 --ffn-hidden-size 48"
    assert "must divide num_query_groups=4 or be a multiple of it; use 4 or 12" in problems(6, six)
    assert "must divide ffn_hidden_size=50; use 2 or 5, or --ffn-hidden-size 48 or 52" in problems(
        4, "--ffn-hidden-size 50"
    )
    assert problems(4, "--num-query-groups 1") == problems(4, "--num-query-groups 2") == problems(4) == ""


def test_sequence_parallelism_splits_the_samples(load):
    config = with_axes(load("--sequence-parallel --seq-length 30"), tp=4, pp=1)
    assert "must be a multiple of 4; use --seq-length 28 or 32" in "\n".join(layout_problems(config, 4))
    assert "sequence_parallel=true needs tensor_model_parallel_size > 1" in "\n".join(
        layout_problems(load("--sequence-parallel"), 1)
    )
    assert layout_problems(with_axes(load("--sequence-parallel"), tp=4, pp=1), 4) == []


@given(st.integers(1, 10_000), st.integers(1, 100))
def test_nearest_multiples_are_multiples_and_surround_the_number(number, factor):
    nearest = [int(word) for word in nearest_multiples(number, factor).split(" or ")]
    assert all(value > 0 and value % factor == 0 for value in nearest)
    assert min(abs(value - number) for value in nearest) <= factor
    assert len(nearest) == 1 or nearest[0] <= number < nearest[1]


@given(micro=st.integers(1, 8), steps=st.integers(1, 8), ranks=st.integers(1, 8))
def test_every_product_is_a_layout(micro, steps, ranks):
    words = (
        "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 8 --lr 1 --train-iters 1 --mock-data "
        f"--micro-batch-size {micro} --global-batch-size {micro * steps * ranks}"
    )
    config = load_config(words.split())
    assert check_layout(config, ranks) == ranks
    assert config.batch.accumulation(ranks) == steps
