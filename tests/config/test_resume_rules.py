"""What may change on resume, as the fields say."""

from megalm.config.data import split_shares
from megalm.config.merging.settings import SECTIONS
from megalm.config.sections import RunConfig


def test_model_data_and_seed_are_fixed_and_nothing_else() -> None:
    fixed = {f"{section}.{name}" for section, cls in SECTIONS.items() for name in cls.model_fields
             if cls.resume_rule(name)}  # fmt: skip
    model = {f"model.{name}" for name in RunConfig.model_fields["model"].annotation.model_fields}  # type: ignore[union-attr]
    data = {
        f"data.{name}" for name in (
            "split", "sampling", "mock_data", "eod_mask_loss", "mask_prob", "whole_word_masking", "short_seq_prob",
            "noise_density", "mean_noise_span_length", "ul2_denoisers", "bert_sentence_head", "masking_max_ngram",
            "masking_use_longer_ngrams", "masking_use_geometric_distribution", "fim_rate", "fim_spm_rate", "fim_unit",
            "fim_split_sample", "fim_fragment_rate", "fim_no_prefix", "fim_prefix_token", "fim_middle_token",
            "fim_suffix_token",
        )
    }  # fmt: skip
    assert fixed == model | data | {"batch.seq_length", "training.seed"}


def test_a_split_is_compared_by_its_shares() -> None:
    rule = SECTIONS["data"].resume_rule("split")
    assert rule is not None
    assert rule.meaning is split_shares
    assert rule.meaning("969, 30, 1") == rule.meaning("969,30,1") != rule.meaning("9,1")


def test_weights_alone_need_what_gives_them_their_meaning() -> None:
    model = SECTIONS["model"]
    rules = {name: model.resume_rule(name) for name in model.model_fields}
    assert {name for name, rule in rules.items() if rule is not None and not rule.weights} == {
        "rotary_base", "rotary_seq_len_interpolation_factor", "attention_dropout", "hidden_dropout", "init_method_std",
        "norm_epsilon", "make_vocab_size_divisible_by", "max_position_embeddings", "init_method_xavier_uniform",
        "rotary_base_local", "rope_scaling", "rope_scaling_factor", "rope_scaling_original_max_position_embeddings",
        "rope_low_freq_factor", "rope_high_freq_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_attention_factor",
        "window_size", "window_attn_skip_freq", "decoder_seq_length", "relative_attention_max_distance",
        "rtd_loss_weight", "mtp_loss_scaling_factor", "segment_memory",
    }  # fmt: skip


def test_states_that_begin_with_a_setting_are_those_of_the_loss_scale() -> None:
    begun = {name: cls.state_begun(name) for cls in SECTIONS.values() for name in cls.model_fields}
    assert {name: path[-1] for name, path in begun.items() if path} == {
        "loss_scale": "cur_scale", "initial_loss_scale": "cur_scale", "hysteresis": "cur_hysteresis",
    }  # fmt: skip
