"""YAML files of GPT-NeoX (their JSON with comments, trailing commas and dashes or underscores in names is YAML too)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from megalm.config.merging.names import unsupported_text
from megalm.config.merging.recipe import RecipeLoader
from megalm.config.merging.settings import SETTINGS
from megalm.config.translation.table import Translation
from megalm.errors import ConfigError
from megalm.storage.documents import DocumentError, parse_yaml

RENAMED = {
    "num_kv_heads": "num_query_groups",
    "model_parallel_size": "tensor_model_parallel_size",
    "rotary_pct": "rotary_percent",
    "rotary_emb_base": "rotary_base",
    "no_weight_tying": "untie_embeddings_and_output_weights",
    "use_qk_layernorm": "qk_layernorm",
    "layernorm_epsilon": "norm_epsilon",
    "rms_norm_epsilon": "norm_epsilon",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "train_batch_size": "global_batch_size",
    "gradient_clipping": "clip_grad",
    "warmup": "lr_warmup_fraction",
    "checkpoint_factor": "save_interval",
    "keep_last_n_checkpoints": "keep_checkpoints",
    "log_param_norm": "log_params_norm",
}
"""NeoX's name: megalm's."""
NOTHING = {
    "gpt_j_residual": (False, None),
    "output_layer_parallelism": ("column", None),
    "use_bias_in_norms": (True, None),
    "checkpoint_scale": ("linear", None),
    "data_impl": ("mmap", "infer"),
    "precision": ("fp32",),
    "gpt_j_tied": (False, None),
    "attention_softmax_in_fp32": (True, False),
    "zero_allow_untested_optimizer": (True, False),
}
"""Settings that ask for what is always so, and the values that do."""
SPEED = (
    "scaled_upper_triang_masked_softmax_fusion", "scaled_masked_softmax_fusion", "bias_gelu_fusion",
    "bias_dropout_fusion", "rope_fusion", "layernorm_fusion", "rmsnorm_fusion", "use_flashattn_swiglu",
    "steps_per_print", "wall_clock_breakdown", "log_dir", "log_grad_norm", "do_train", "do_valid", "do_test",
    "mlp_multiple_of", "fused_kernels_build_path", "rotary_save_freqs_buffer", "loss_scale_window", "s3_path",
)  # fmt: skip
"""Settings of kernels and logs, which change no result."""
LAUNCH = (
    "hostfile", "include", "exclude", "num_nodes", "num_gpus", "master_addr", "master_port", "launcher", "force_multi",
    "deepspeed_slurm", "deepspeed_mpi", "deepspeed_extra_args", "no_ssh_check", "account", "comment", "user_script",
    "global_num_gpus", "use_shared_fs",
)  # fmt: skip
TOKENIZERS = {
    "HFTokenizer": "HFTokenizer", "HFGPT2Tokenizer": "HFTokenizer", "GPT2BPETokenizer": "GPT2BPETokenizer",
    "SPMTokenizer": "SentencePieceTokenizer", "TiktokenTokenizer": "TikTokenizer",
}  # fmt: skip
REFUSED = {
    "gpt_j_residual": "attention and MLP come one after the other; parallel residual branches are not available",
    "extra_save_iters": "checkpoints are saved every --save-interval steps",
    "checkpoint_scale": "checkpoints are saved every --save-interval steps",
    "lr_decay_fraction": "give the end of the decay: lr_decay_iters",
    "train_epochs": "give the length of the run in train_iters, train_samples or train_tokens",
    "use_bias_in_norms": "LayerNorm always has biases, RMSNorm never",
}
"""Why a setting is not taken, where Megatron has none of its name."""
Rule = Callable[[Translation, str, Any, dict[str, Any]], None]


def from_yaml(texts: Sequence[str], source: str) -> Translation:
    """The translation of NeoX's files, merged from left to right.

    Raises:
        ConfigError: a file is no YAML, a key stands in two of them, or what is understood is no run.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        for key, value in _read(text, source).items():
            name = str(key).replace("-", "_")
            if name in settings:
                raise ConfigError(f"{source}: {name} stands twice; GPT-NeoX refuses that too")
            settings[name] = value
    found = Translation(source)
    for name, value in settings.items():
        _translate(found, name, value, settings)
    _defaults(found, settings)
    found.settle()
    return found


def _read(text: str, source: str) -> dict[Any, Any]:
    try:
        _, content = parse_yaml(text.encode(), RecipeLoader)
    except DocumentError as error:
        raise ConfigError(f"{source}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{source}: a configuration of GPT-NeoX is a mapping of settings")
    return content


def _translate(found: Translation, name: str, value: Any, settings: dict[str, Any]) -> None:
    """What becomes of one setting."""
    theirs = f"{name}: {value}"
    if name in RULES:
        RULES[name](found, theirs, value, settings)
    elif name in NOTHING and value in NOTHING[name]:
        found.add(theirs, "nothing", "always so")
    elif name in SPEED:
        found.add(theirs, "nothing", "kernels and logs are chosen by megalm")
    elif name in LAUNCH:
        found.add(theirs, "launch", "give it to the launcher, or to `megalm submit`")
    elif value is None or value is False or value in ([], {}):
        found.add(theirs, "nothing", "off")
    elif name in RENAMED:
        found.give(theirs, RENAMED[name], value)
    elif name in SETTINGS:
        found.give(theirs, name, value, "same")
    else:
        text = unsupported_text(name.replace("_", "-")) or "; megalm has nothing of this name"
        found.add(theirs, "REFUSED", REFUSED.get(name) or text.partition("; ")[2])


def _choice(name: str, words: dict[Any, Any], refused: str) -> Rule:
    """A word that is another here."""

    def rule(found: Translation, theirs: str, value: Any, _settings: dict[str, Any]) -> None:
        if value in words:
            found.give(theirs, name, words[value])
        else:
            found.add(theirs, "REFUSED", refused)

    return rule


def _activation(found: Translation, theirs: str, value: Any, settings: dict[str, Any]) -> None:
    if value != "swiglu":
        known = "the activations are gelu and swiglu"
        found.add(theirs, "nothing" if value == "gelu" else "REFUSED", "the default" if value == "gelu" else known)
        return
    found.give(theirs, "swiglu", True)
    width, multiple = settings.get("intermediate_size"), settings.get("mlp_multiple_of", 1)
    width = width or 4 * settings.get("hidden_size", 0)
    size = -(-(int(width * 2 / 3) // 2) // multiple) * multiple  # NeoX counts gate and up as one, then two thirds
    if size:
        found.give(f"(intermediate_size {width} of gate and up)", "ffn_hidden_size", size, "written")


def _intermediate(found: Translation, theirs: str, value: Any, settings: dict[str, Any]) -> None:
    if value is not None and settings.get("activation") != "swiglu":
        found.give(theirs, "ffn_hidden_size", value)


def _biases(found: Translation, theirs: str, value: Any, settings: dict[str, Any]) -> None:
    if value:
        found.add(theirs, "nothing", "the default")
        return
    found.give(theirs, "disable_bias_linear", True)
    if settings.get("use_bias_in_mlp", True) and settings.get("activation") != "swiglu":
        found.add("use_bias_in_mlp: true", "REFUSED", "biases of the MLP alone are not available; it has none")


def _optimizer(found: Translation, theirs: str, value: Any, _settings: dict[str, Any]) -> None:
    kind, params = str(value.get("type", "adam")).lower(), value.get("params", {})
    _choice("optimizer", {"adam": "adam", "adamw": "adam", "lion": "lion"}, "the optimizers are adam, lion and muon")(
        found, f"optimizer.type: {value.get('type', 'adam')}", kind, {}
    )
    beta = "lion" if kind == "lion" else "adam"
    for name, content in params.items():
        theirs = f"optimizer.params.{name}: {content}"
        if name == "betas" and isinstance(content, list) and len(content) == 2:
            found.give(theirs, f"{beta}_beta1", content[0])
            found.give(theirs, f"{beta}_beta2", content[1])
        elif name in ("lr", "weight_decay", "eps"):
            found.give(theirs, {"eps": "adam_eps"}.get(name, name), content)
        else:
            found.add(theirs, "REFUSED", "megalm has nothing of this name")


def _zero(found: Translation, theirs: str, value: Any, _settings: dict[str, Any]) -> None:
    found.give(f"zero_optimization.stage: {value.get('stage', 0)}", "zero_stage", value.get("stage", 0))
    rest = {key: content for key, content in value.items() if key != "stage" and content is not False}
    offload = [key for key in rest if key.startswith("cpu_offload")]
    for key in offload:
        found.add(
            f"zero_optimization.{key}: {rest.pop(key)}", "REFUSED", 'use "offload_optimizer" of DeepSpeed\'s JSON'
        )
    if rest:
        found.give(f"zero_optimization: {', '.join(rest)}", "deepspeed_config", {"zero_optimization": rest})


def _fp16(found: Translation, theirs: str, value: Any, _settings: dict[str, Any]) -> None:
    if not value.get("enabled", value.get("fp16", True)):
        found.add(theirs, "nothing", "off")
    elif str(value.get("type", "")).startswith("bf"):
        found.give(theirs, "bf16", True)
    else:
        found.give("fp16.enabled: true", "fp16", True)
        for name in ("loss_scale_window", "hysteresis", "min_loss_scale"):
            if name in value:
                found.give(f"fp16.{name}: {value[name]}", name, value[name])
        if value.get("loss_scale"):
            found.give(f"fp16.loss_scale: {value['loss_scale']}", "loss_scale", value["loss_scale"])
        power = value.get("initial_scale_power", 32)  # DeepSpeed's default in NeoX
        found.give(f"fp16.initial_scale_power: {power}", "initial_loss_scale", 2.0 ** min(int(power), 1000))


def _bf16(found: Translation, theirs: str, value: Any, _settings: dict[str, Any]) -> None:
    if value.get("enabled", True):
        found.give(theirs, "bf16", True)


def _init(found: Translation, theirs: str, value: Any, settings: dict[str, Any]) -> None:
    if value == "small_init":
        found.give(theirs, "init_method_std", math.sqrt(2 / (5 * settings.get("hidden_size", 1))))
    elif value == "xavier_uniform":
        found.give(theirs, "init_method_xavier_uniform", True)
    else:
        known = "initial weights are normal, small_init or xavier_uniform"
        found.add(theirs, "nothing" if value == "normal" else "REFUSED", "the default" if value == "normal" else known)


def _output_init(found: Translation, theirs: str, value: Any, _settings: dict[str, Any]) -> None:
    ours = "output projections have init_method_std / sqrt(2 x num_layers)"
    found.add(theirs, "nothing" if value == "scaled_normal" else "REFUSED", ours)


def _recompute(found: Translation, theirs: str, value: Any, settings: dict[str, Any]) -> None:
    if value:
        found.give(theirs, "recompute_granularity", "full")
        found.give("checkpoint_num_layers", "recompute_num_layers", settings.get("checkpoint_num_layers", 1))


def _attention(found: Translation, theirs: str, value: Any, _settings: dict[str, Any]) -> None:
    kinds = {kind for block in value for kind in (block[0] if isinstance(block, list) else [block])}
    known = kinds <= {"global", "flash"}
    why = (
        "attention always runs in a fused kernel where the device has one" if known else "only global attention exists"
    )
    found.add(theirs, "nothing" if known else "REFUSED", why)


def _stages(found: Translation, theirs: str, value: Any, _settings: dict[str, Any]) -> None:
    found.give(theirs, "pipeline_model_parallel_size", max(1, value))


def _paths(found: Translation, theirs: str, value: Any, settings: dict[str, Any]) -> None:
    name = theirs.partition(":")[0]
    weights = settings.get(name.replace("paths", "weights"))
    pairs = zip(weights, value, strict=False) if weights else ((None, path) for path in value)
    words = [str(word) for pair in pairs for word in pair if word is not None]
    found.give(theirs, name.removesuffix("s"), words)


def _tokenizer(found: Translation, theirs: str, value: Any, settings: dict[str, Any]) -> None:
    kind = TOKENIZERS.get(value)
    if kind is None:
        found.add(theirs, "REFUSED", f"the tokenizers are {', '.join(dict.fromkeys(TOKENIZERS.values()))}")
        return
    found.give(theirs, "tokenizer_type", kind)


def _vocab(found: Translation, theirs: str, value: Any, settings: dict[str, Any]) -> None:
    one_file = settings.get("tokenizer_type", "GPT2BPETokenizer") not in ("GPT2BPETokenizer", None)
    found.give(theirs, "tokenizer_model" if one_file else "vocab_file", value, "renamed" if one_file else "same")


def _skip(found: Translation, theirs: str, value: Any, _settings: dict[str, Any]) -> None:
    """Read by another rule."""


RULES: dict[str, Rule] = {
    "activation": _activation,
    "attention_config": _attention,
    "bf16": _bf16,
    "checkpoint_activations": _recompute,
    "checkpoint_num_layers": _skip,
    "fp16": _fp16,
    "init_method": _init,
    "intermediate_size": _intermediate,
    "norm": _choice(
        "normalization", {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}, "normalization is layernorm or rmsnorm"
    ),
    "optimizer": _optimizer,
    "output_layer_init_method": _output_init,
    "pipe_parallel_size": _stages,
    "pos_emb": _choice(
        "position_embedding_type",
        {"rotary": "rope", "learned": "learned_absolute", "none": "none"},
        "positions are rotary, learned or none",
    ),
    "tokenizer_type": _tokenizer,
    "use_bias_in_attn_linear": _biases,
    "use_bias_in_mlp": _skip,
    "vocab_file": _vocab,
    "zero_optimization": _zero,
    **{f"{part}_data_paths": _paths for part in ("train", "valid", "test")},
    **{f"{part}_data_weights": _skip for part in ("train", "valid", "test")},
}
"""Settings that say it in another form."""


def _defaults(found: Translation, settings: dict[str, Any]) -> None:
    """NeoX's defaults where they are others than megalm's and change the training."""
    for name, value in (("weight_decay", 0.1), ("lr_warmup_fraction", 0.01)):
        if name not in found.given:
            found.give(f"({name}: {value})", name, value, "written")
    if settings.get("norm") == "rmsnorm" and "rms_norm_epsilon" not in settings:
        found.give("(rms_norm_epsilon: 1e-8)", "norm_epsilon", 1e-8, "written")
    if "tokenizer_type" not in settings and "merge_file" in found.given:
        found.give("(tokenizer_type: GPT2BPETokenizer)", "tokenizer_type", "GPT2BPETokenizer", "written")
