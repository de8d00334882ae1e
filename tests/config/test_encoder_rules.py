"""Settings of encoders: defaults of the family, and what does not go together."""

import re

import pytest

from megalm.config.merging.load import load, load_config
from megalm.config.model import ModelConfig
from megalm.config.rules.encoder import NO_ENCODER, ONLY_ENCODERS
from megalm.config.rules.layout import layout_problems
from megalm.config.rules.loss import cross_entropy_impl
from megalm.config.rules.objective import FAMILY_OF, OBJECTIVES_OF, SETTINGS_OF
from megalm.errors import ConfigError

RUN = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --micro-batch-size 1 --train-iters 1 "
    "--lr 0.1 --mock-data --vocab-size 99"
)
BERT = f"{RUN} --model-family bert --objective masked"
ELECTRA = f"{RUN} --model-family electra --objective rtd --rtd-generator-size 0.5"
VALUES = {
    "num_tokentypes": "3", "embedding_norm": "", "embedding_size": "8", "bert_no_binary_head": "",
    "use_parallel_residual": "", "scale_embeddings": "", "attn_logit_softcapping": "5", "final_logit_softcapping": "5",
    "mask_prob": "0.3", "short_seq_prob": "0", "whole_word_masking": "", "noise_density": "0.3",
    "mean_noise_span_length": "2", "ul2_denoisers": "R:0.15:3",
    "fim_rate": "0.1", "fim_spm_rate": "0.1", "fim_unit": "character",
    "fim_split_sample": "x", "fim_fragment_rate": "0.1", "fim_no_prefix": "x", "fim_prefix_token": "x",
    "fim_middle_token": "x", "fim_suffix_token": "x", "masking_max_ngram": "3", "masking_use_longer_ngrams": "",
    "masking_use_geometric_distribution": "", "bert_sentence_head": "nsp",
}  # fmt: skip


def problems(flags):
    with pytest.raises(ConfigError) as error:
        load_config(flags.split())
    return error.value.problems


def flag(name):
    return f"--{name.replace('_', '-')} {VALUES[name]}"


def test_the_family_brings_its_defaults_and_flags_win():
    model = load_config(BERT.split()).model
    assert (model.norm_order, model.norm_epsilon, model.embedding_norm, model.num_tokentypes) == (
        "post",
        1e-12,
        True,
        2,
    )
    assert model.has_sentence_head
    other = load_config(f"{BERT} --norm-order pre --num-tokentypes 0 --bert-no-binary-head".split()).model
    assert (other.norm_order, other.num_tokentypes, other.has_sentence_head) == ("pre", 0, False)
    decoder = load_config(RUN.split()).model
    assert (decoder.norm_order, decoder.norm_epsilon, decoder.embedding_norm) == ("pre", 1e-5, False)
    assert ModelConfig.model_validate(model.model_dump()) == model


def test_a_script_names_family_and_objective_below_recipe_and_flags():
    defaults = {"model_family": "bert", "objective": "masked"}
    assert load(RUN.split(), "pretrain_bert.py", defaults).config.model.model_family == "bert"
    other = load(f"{RUN} --model-family gpt --objective causal".split(), "pretrain_bert.py", defaults).config
    assert (other.model.model_family, other.training.objective) == ("gpt", "causal")


def test_large_logits_are_not_held():
    assert cross_entropy_impl(load_config(f"{BERT} --micro-batch-size 100000 --vocab-size 100000".split())) == "linear"


@pytest.mark.parametrize("name", ONLY_ENCODERS)
def test_what_only_encoders_have_says_nothing_to_a_decoder(name):
    assert problems(f"{RUN} {flag(name)}")[0].startswith(f"{name}={(VALUES[name] or 'true')} is for model_family=bert")


@pytest.mark.parametrize("name", NO_ENCODER)
def test_what_encoders_lack_is_refused(name):
    assert any(f"{name}=" in problem for problem in problems(f"{BERT} {flag(name)}"))


@pytest.mark.parametrize("objective", SETTINGS_OF)
def test_settings_of_an_objective_say_nothing_to_others(objective):
    other = next(name for name in OBJECTIVES_OF["gpt"] if name != objective)
    for name in SETTINGS_OF[objective]:
        (problem,) = problems(f"{RUN} --objective {other} {flag(name)}")
        assert re.match(f"{name}=\\S+ is for objective=(masked or )?{objective}(?: or rtd)?; drop one of them", problem)


@pytest.mark.parametrize("objective", FAMILY_OF)
def test_an_objective_trains_one_family(objective):
    for family in ("gpt", "bert"):
        if objective not in OBJECTIVES_OF[family]:
            (problem,) = problems(f"{RUN} --model-family {family} --objective {objective}")
            way_on = f"use --model-family {FAMILY_OF[objective]}, or --objective {OBJECTIVES_OF[family][0]}"
            assert problem.startswith(f"objective={objective} trains ")
            assert way_on in problem


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (f"{RUN} --norm-order post", "norm_order=post needs model_family=bert"),
        (f"{RUN} --objective masked", "use --model-family bert, or --objective causal"),
        (f"{RUN} --model-family bert", "or --objective masked"),
        (f"{BERT} --norm-order branch", "use post or pre"),
        (f"{ELECTRA} --sample-prompt x", "model_family=electra tells replaced tokens"),
        (f"{BERT} --num-tokentypes 1", "use 2, or --bert-no-binary-head"),
        (f"{BERT} --seq-length 4", "use --seq-length 5 or more"),
        (f"{BERT} --seq-length 2 --bert-no-binary-head", "use --seq-length 3 or more"),
        (f"{BERT} --eod-mask-loss", "which never hides them"),
        (f"{BERT} --reset-attention-mask", "give --bert-no-binary-head"),
        (f"{BERT} --reset-position-ids", "give --bert-no-binary-head"),
        (f"{BERT} --bert-no-binary-head --short-seq-prob 0.5", "for pairs of texts"),
        (f"{BERT} --bert-no-binary-head --bert-sentence-head nsp", "for a head that --bert-no-binary-head leaves out"),
        (f"{BERT} --masking-use-longer-ngrams", "is for masking_max_ngram > 1"),
        (f"{BERT} --masking-max-ngram 14", "masking_max_ngram=14 is longer than the 13 tokens of a text"),
        (f"{BERT} --masking-max-ngram 3 --mask-prob 0.7", "use --mask-prob 0.62 or less"),
        (f"{BERT} --mask-prob 0", "mask_prob=0"),
        (f"{BERT} --mask-prob 1", "mask_prob=1"),
        (f"{BERT} --rtd-generator-size 0.5", "rtd_generator_size=0.5 is for model_family=electra"),
        (f"{RUN} --rtd-loss-weight 1", "rtd_loss_weight=1.0 is for model_family=electra"),
        (f"{BERT} --objective rtd", "use --model-family electra, or --objective masked"),
        (f"{BERT} --objective-mixture masked:1,rtd:1", "use --model-family electra, or --objective masked"),
        (f"{ELECTRA} --objective masked", "use --model-family bert, or --objective rtd"),
        (f"{ELECTRA} --rtd-generator-size 0.3", "of num_attention_heads=2 is no whole number of heads; use a multiple"),
        (f"{ELECTRA} --rtd-generator-size 0", "leaves nobody who replaces tokens"),
        (f"{ELECTRA} --rtd-generator-size 1.5", "rtd_generator_size=1.5"),
        (f"{ELECTRA} --rtd-loss-weight -1", "rtd_loss_weight=-1"),
        (f"{ELECTRA} --ffn-hidden-size 33", "of ffn_hidden_size=33 is no whole number; use a multiple of 2"),
        (f"{ELECTRA} --kv-channels 5 --hidden-size 15", "of hidden_size=15 is no whole number; use a multiple of 2"),
        (f"{ELECTRA} --num-query-groups 1", "model_family=electra has no num_query_groups=1"),
        (f"{ELECTRA} --bert-no-binary-head", "bert_no_binary_head=true is for model_family=bert"),
        (f"{ELECTRA} --pipeline-model-parallel-size 2", "the generator's loss arises in the middle of the model"),
        (f"{ELECTRA} --seq-length 2", "use --seq-length 3 or more"),
        (f"{ELECTRA} --eod-mask-loss", "objective=rtd, which never hides them"),
        (f"{ELECTRA} --short-seq-prob 0.5", "short_seq_prob=0.5 is for objective=masked"),
        (f"{ELECTRA} --masking-max-ngram 15", "longer than the 14 tokens of a text"),
    ],
)
def test_what_does_not_go_together_is_one_problem(flags, expected):
    found = problems(flags)
    assert len(found) == 1
    assert expected in found[0]


def test_the_heads_of_a_generator_are_shared_by_ranks_too():
    flags = f"{ELECTRA} --num-attention-heads 4 --tensor-model-parallel-size"
    assert layout_problems(load_config(f"{flags} 2".split()), 2) == []
    (problem,) = layout_problems(load_config(f"{flags} 4".split()), 4)
    assert "must divide num_attention_heads=2 of the generator" in problem
    assert "use 2, or a larger --rtd-generator-size" in problem
    (problem,) = layout_problems(load_config(f"{flags} 2 --ffn-hidden-size 30".split()), 2)
    assert "must divide ffn_hidden_size=15 of the generator" in problem


def test_a_window_may_look_ahead_in_an_encoder_only():
    assert load_config(f"{BERT} --window-size 3,2".split()).model.window_of(0) == (3, 2)
    assert "a decoder needs RIGHT = 0" in problems(f"{RUN} --window-size 3,2")[0]
