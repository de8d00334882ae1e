"""Generation: the cache changes nothing, sampling follows its knobs, samples are reproducible."""

import pytest
import torch

from megalm.errors import ConfigError
from megalm.models.generation import continue_greedily, generate, sample_tokens, truncate_logits
from megalm.testing.batches import logits

PROMPT = [5, 17, 3, 42]


def test_greedy_decode_equals_argmax_without_cache(style_config, build):
    model = build(style_config)
    tokens = list(PROMPT)
    for _ in range(12):
        tokens.append(logits(model, torch.tensor([tokens]))[0, -1].argmax().item())
    assert generate(model, PROMPT, 12, temperature=0.0) == [tokens[4:]]


def test_continuing_without_a_cache_is_greedy_decoding(config_of, build):
    model = build(config_of("llama")).eval()
    cpu = torch.device("cpu")
    expected = generate(model, PROMPT, 12, temperature=0.0)[0]
    assert continue_greedily(lambda tokens: logits(model, tokens)[:, -1], PROMPT, 12, None, cpu) == expected
    stop = expected[3]
    stopped = continue_greedily(lambda tokens: logits(model, tokens)[:, -1], PROMPT, 12, stop, cpu)
    assert stopped == expected[: expected.index(stop) + 1]


def test_same_seed_gives_the_same_samples_whatever_their_number(config_of, build):
    model = build(config_of("llama"))
    samples = generate(model, PROMPT, 15, num_samples=4, seed=3)
    assert samples == generate(model, PROMPT, 15, num_samples=4, seed=3)
    assert samples[:2] == generate(model, PROMPT, 15, num_samples=2, seed=3)
    assert len({tuple(sample) for sample in samples}) == 4
    assert samples != generate(model, PROMPT, 15, num_samples=4, seed=4)


def test_sampled_tokens_are_never_padding(config_of, build):
    model = build(config_of("llama", vocab_size=3), padded_vocab_size=128)
    samples = generate(model, [0, 1], 20, num_samples=5, temperature=100.0)
    assert {token for sample in samples for token in sample} == {0, 1, 2}


def test_a_sample_ends_with_its_first_stop_token(config_of, build):
    model = build(config_of("llama"))
    free = generate(model, PROMPT, 20, num_samples=3, seed=1)
    stop = free[1][4]
    stopped = generate(model, PROMPT, 20, num_samples=3, seed=1, stop_token=stop)
    for sample, whole in zip(stopped, free, strict=True):
        end = whole.index(stop) + 1 if stop in whole else 20
        assert sample == whole[:end]


def test_mode_of_the_model_is_restored(config_of, build):
    for training in (True, False):
        model = build(config_of("gpt2", hidden_dropout=0.5)).train(training)
        generate(model, PROMPT, 2)
        assert model.training is training


def test_learned_positions_limit_the_length(config_of, build):
    model = build(config_of("gpt2"))
    assert len(generate(model, PROMPT, 20)[0]) == 20
    with pytest.raises(ConfigError, match="at most 20 new tokens"):
        generate(model, PROMPT, 21)
    assert len(generate(build(config_of("llama")), PROMPT, 30)[0]) == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_tokens": []}, "prompt is empty"),
        ({"prompt_tokens": [100]}, "vocab_size=100"),
        ({"prompt_tokens": [-1]}, "vocab_size=100"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"num_samples": 0}, "num_samples"),
    ],
)
def test_arguments_out_of_range_are_named(config_of, build, arguments, message):
    with pytest.raises(ConfigError, match=message):
        generate(build(config_of()), **({"prompt_tokens": PROMPT, "max_new_tokens": 1} | arguments))


def kept(logits, top_k, top_p):
    result = truncate_logits(torch.tensor([logits]), top_k, top_p)[0]
    for value, original in zip(result.tolist(), logits, strict=True):
        assert value in (original, float("-inf"))
    return [token for token, value in enumerate(result.tolist()) if value > float("-inf")]


def test_top_k_keeps_exactly_k_even_among_equals():
    assert kept([1.0, 3.0, 2.0, 0.0], 2, 1.0) == [1, 2]
    assert kept([1.0, 1.0, 1.0, 1.0], 3, 1.0) == [0, 1, 2]
    assert kept([1.0, 3.0, 2.0, 0.0], 0, 1.0) == [0, 1, 2, 3]
    assert kept([1.0, 3.0], 5, 1.0) == [0, 1]


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log().tolist()
    assert kept(logits, 0, 0.45) == [1]
    assert kept(logits, 0, 0.55) == [1, 2]
    assert kept(logits, 0, 0.74) == [1, 2]
    assert kept(logits, 0, 0.76) == [1, 2, 3]
    assert kept(logits, 0, 1e-9) == [1]
    # After top-k 2 the probabilities are 2/3 and 1/3.
    assert kept(logits, 2, 0.6) == [1]
    assert kept(logits, 2, 0.7) == [1, 2]


def test_sampled_frequencies_are_the_probabilities():
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.3])
    uniforms = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    tokens = sample_tokens(probabilities.log().expand(1000, 4), uniforms)
    assert tokens.bincount(minlength=4).tolist() == [500, 0, 200, 300]


def test_extreme_uniforms_draw_tokens_with_probability():
    logits = torch.tensor([[float("-inf"), 0.0, 1.0, float("-inf")]] * 2)
    assert sample_tokens(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 2]
