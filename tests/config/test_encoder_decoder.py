"""What does not go together with an encoder-decoder is named, with what to do."""

import pytest

from megalm.config.merging.load import load_config
from megalm.config.rules.layout import check_layout, layout_problems
from megalm.config.rules.run import run_problems
from megalm.errors import ConfigError

SIZES = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 4 --vocab-size 90 --train-iters 1 --lr 0.1 --mock-data "
    "--micro-batch-size 1 --seq-length 64 "
)
T5 = "--position-embedding-type relative --normalization RMSNorm --disable-bias-linear --model-family t5 "
SPAN = f"{T5} --objective span "


def test_the_names_of_megatron_are_understood() -> None:
    words = SIZES.replace("--num-layers", "--encoder-num-layers").replace("--seq-length", "--encoder-seq-length")
    flags = (
        f"{words} {SPAN} --decoder-num-layers 3 --decoder-seq-length 20 --relative-attention-num-buckets 16 "
        "--relative-attention-max-distance 40"
    )
    config = load_config(flags.split())
    model = config.model
    assert (model.num_layers, model.decoder_layers, model.total_layers) == (2, 3, 5)
    assert (config.batch.seq_length, model.decoder_seq_length) == (64, 20)
    assert load_config((SIZES + SPAN).split()).model.total_layers == 4


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--model-family t5 --objective span", "needs position_embedding_type=relative, normalization=RMSNorm, disable_"
         "bias_linear=true; give --position-embedding-type relative --normalization RMSNorm --disable-bias-linear"),
        (T5, "objective=causal trains decoders, not model_family=t5; use --model-family gpt, or --objective span"),
        (f"{T5} --objective masked", "objective=masked trains encoders, not model_family=t5; use --model-family bert"),
        ("--objective span", "objective=span trains encoder-decoders, not model_family=gpt"),
        ("--position-embedding-type relative", "position_embedding_type=relative needs model_family=t5"),
        ("--decoder-num-layers 2", "decoder_num_layers=2 needs model_family=t5; drop it"),
        ("--decoder-seq-length 9", "decoder_seq_length=9 needs model_family=t5; drop it"),
        (SPAN + "--window-size 4,0", "model_family=t5 has no window_size="),
        (SPAN + "--qk-layernorm", "model_family=t5 has no qk_layernorm=true; drop --qk-layernorm"),
        (SPAN + "--init-method-std 0.1", "model_family=t5 has no init_method_std=0.1"),
        (SPAN + "--num-query-groups 2", "model_family=t5 has no num_query_groups=2"),
        (SPAN + "--reset-attention-mask", "reset_attention_mask=true is for decoders"),
        (SPAN + "--relative-attention-max-distance 16", "relative_attention_max_distance=16 must be more than half of"),
        (SPAN + "--seq-length 2", "seq_length=2 and decoder_seq_length=1 leave span corruption no text"),
        (SPAN + "--decoder-seq-length 2", "decoder_seq_length=2 leave span corruption no text"),
        (SPAN + "--mean-noise-span-length 40", "mean_noise_span_length=40 is longer than the 11 noise tokens"),
        (f"{T5} --objective ul2", "the mean span 64 of ul2_denoisers is longer than the "),
        (f"{T5} --objective ul2 --ul2-denoisers R:2:3", '"R:2:3" must be R:DENSITY:MEAN'),
        (f"{T5} --objective ul2 --ul2-denoisers S:0.2:3", '"S:0.2:3" must be R:DENSITY:MEAN'),
        (f"{T5} --objective ul2 --ul2-denoisers=", "must name one denoiser at least"),
        (SPAN + "--objective-mixture span:1,causal:1", "objective_mixture: objective=causal trains decoders"),
        (SPAN + "--objective-mixture span:0", "the weights sum to 0"),
        (SPAN + "--objective-mixture span", '"span" must be an objective and its weight'),
        (SPAN + "--objective-mixture span:-1", "the weight of span must not be negative"),
        (SPAN + "--objective-mixture span:1,span:2", "span stands twice"),
        (SPAN + "--objective-mixture spam:1", "objective=spam must be one of"),
        (SPAN + "--noise-density 1", "noise_density=1 (--noise-density) must be less than 1"),
        (SPAN + "--noise-density 0", "noise_density=0 (--noise-density) must be greater than 0"),
        (SPAN + "--pipeline-model-parallel-size 8", "need a layer each, but num_layers=2 + decoder_num_layers=2"),
        (SPAN + "--pipeline-model-parallel-size 2 --pipeline-layout 1,2", "the model num_layers=2 + decoder_num_"),
        (SPAN + "--recompute-granularity full --recompute-num-layers 5", "must not exceed num_layers=2 + decoder_num"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(flags: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config((SIZES + flags).split())
    assert expected in str(caught.value)


def test_sequence_parallelism_splits_both_lengths() -> None:
    flags = f"{SIZES}{SPAN}--tensor-model-parallel-size 4 --sequence-parallel "
    problems = "\n".join(layout_problems(load_config(flags.split()), 4))
    assert "splits decoder_seq_length=14 over tensor_model_parallel_size=4 ranks" in problems
    assert "use --decoder-seq-length 12 or 16" in problems
    assert check_layout(load_config((flags + "--decoder-seq-length 16").split()), 4) == 1


def test_any_schedule_takes_an_encoder_decoder() -> None:
    for schedule in ("gpipe", "1f1b", "interleaved-1f1b", "interleaved-zero-bubble", "zbv", "dualpipev"):
        flags = f"{SIZES}{SPAN}--pipeline-model-parallel-size 2 --zero-stage 1 --pipeline-schedule {schedule}"
        assert run_problems(load_config(flags.split())) == []
