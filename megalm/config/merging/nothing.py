"""Flags of the peers that ask for what is always so: accepted in flags and recipes alike, and said in a note.

One table, which both parsers use. Names are written without the leading dashes and with `-` between words.
"""

from dataclasses import dataclass
from typing import Any

ANY = "any value"


@dataclass(frozen=True)
class Nothing:
    """What a flag without effect may say."""

    values: tuple[str, ...]
    """The values that ask for nothing; none: it is a switch."""
    why: str
    otherwise: str = ""
    """What to do about another value."""

    def allows(self, value: Any) -> bool:
        """Whether a value asks for nothing; a switch that is off does."""
        if value is None or value is False:  # 0 is a value
            return True
        word = str(value).lower()
        return (value is True or word == "true") if not self.values else word in self.values or ANY in self.values

    def problem(self, name: str, value: Any) -> str:
        """What to say about a value that asks for something."""
        allowed = " or ".join(self.values) or "true"
        return f"{name} {value} is not supported here: {self.otherwise or self.why}; use {allowed}, or drop it"


def _rows(names: str, values: tuple[str, ...], why: str, otherwise: str = "") -> dict[str, Nothing]:
    """Blank-separated names, the values that ask for nothing, why they do, and what to do about other values."""
    return dict.fromkeys(names.split(), Nothing(values, why, otherwise))


_NO_EXPERTS = "mixture-of-experts models are not available in this version; train a dense model"
_ONE_RANK = "this form of parallelism is not available in this version; use data parallelism with --zero-stage"
_KERNELS = "megalm chooses kernels when the model is built, by --kernels-backend"

NO_EFFECT: dict[str, Nothing] = {
    **_rows("no-position-embedding", (), "--position-embedding-type rope and none have no table of positions"),
    **_rows("group-query-attention", (), "--num-query-groups alone turns grouped-query attention on"),
    **_rows("no-pipeline-parallel", (), "without pipeline stages the model is always a plain module"),
    **_rows("no-query-key-layer-scaling", (), "megalm never scales attention scores by the layer number"),
    **_rows("attention-softmax-in-fp32", (), "the attention softmax is always computed in fp32"),
    **_rows("use-flash-attn use-flash-attn-v1 use-flash-attn-v2 use-flash-attn-triton", (),
     "attention always runs in a fused kernel where the device has one"),
    **_rows("attention-backend", ("auto", "flash", "fused"),
     "attention always runs in a fused kernel where the device has one", _KERNELS),
    **_rows("no-masked-softmax-fusion no-bias-gelu-fusion no-bias-swiglu-fusion no-bias-dropout-fusion", (),
     "there is no such kernel here to turn off; --kernels-backend reference turns megalm's own off"),
    **_rows("no-rope-fusion no-gradient-accumulation-fusion no-persist-layer-norm", (),
     "there is no such kernel here to turn off; --kernels-backend reference turns megalm's own off"),
    **_rows("use-mcore-models", (), "there is one implementation of the model"),
    **_rows("transformer-impl", ("local",), "layers are always megalm's own"),
    **_rows("cross-entropy-loss-fusion", (),
     "the loss is always one operator; --cross-entropy-fusion-impl says of what"),
    **_rows("calculate-per-token-loss", (), "the loss is always the mean over the tokens of the global batch"),
    **_rows("exit-signal-handler exit-signal-handler-for-training exit-signal-handler-for-dataloader", (),
     "SIGTERM, SIGUSR1 and SIGUSR2 always save and end the run"),
    **_rows("exit-signal", ("sigterm",), "SIGTERM, SIGUSR1 and SIGUSR2 always save and end the run"),
    **_rows("exit-on-missing-checkpoint", (), "a missing --load is always an error"),
    **_rows("override-opt-param-scheduler", (), "the flags always decide over a checkpoint's schedule"),
    **_rows("no-load-rng no-save-rng", (), "random draws follow from --seed and the step; no state of them is stored"),
    **_rows("use-cpu-initialization", (), "weights are drawn on the CPU, the same under every layout"),
    **_rows("data-impl", ("infer", "mmap"), "datasets are always memory-mapped"),
    **_rows("dataloader-type", ("single",), "samples are always numbered and read once, in one order"),
    **_rows("no-create-attention-mask-in-dataloader", (), "the causal mask is never stored"),
    **_rows("use-gigatoken", (), "the fast encoder always runs where it gives the same ids"),
    **_rows("fim-pad-token", (ANY,), "what fills a row has no loss, whatever the token"),
    **_rows("muon-no-split-qkv", (), "query, key and value are separate matrices, and so are gate and up"),
    **_rows("muon-scalar-optimizer", ("adam",), "what Muon leaves out is always AdamW's"),
    **_rows("use-distributed-optimizer", (), "ZeRO 1 and higher spread the optimizer's state over the ranks"),
    **_rows("num-experts", ("1",), "a model without experts has one MLP a layer", _NO_EXPERTS),
    **_rows("mlp-type", ("standard",), "a model without experts has one MLP a layer", _NO_EXPERTS),
    **_rows("moe-expert-parallel-size expert-model-parallel-size expert-tensor-parallel-size", ("1",),
     "a model without experts has nothing to spread", _NO_EXPERTS),
    **_rows("moe-loss-coeff moe-train-capacity-factor moe-eval-capacity-factor moe-min-capacity", (ANY,),
     "a model without experts does not use it"),
    **_rows("ds-sequence-parallel-size", ("1",), "one rank has the whole sequence", _ONE_RANK),
    **_rows("log-timers-to-tensorboard log-batch-size-to-tensorboard log-memory-to-tensorboard", (),
     "TensorBoard gets every value that a run has"),
    **_rows("log-validation-ppl-to-tensorboard log-world-size-to-tensorboard log-loss-scale-to-tensorboard", (),
     "TensorBoard gets every value that a run has"),
    **_rows("log-learning-rate-to-tensorboard", (), "TensorBoard gets every value that a run has"),
    **_rows("log-throughput log-progress", (), "throughput and progress are always logged"),
    **_rows("timing-log-level", ("0",), "the time of a step is always logged",
     "timers inside a step are not available"),
    **_rows("timing-log-option", (ANY,), "there are no timers inside a step to log"),
    **_rows("check-for-nan-in-loss-and-grad", (), "loss and gradients are always checked"),
    **_rows("rerun-mode", ("disabled",), "a step is never run twice", "loss and gradients are always checked"),
    **_rows("manual-gc no-manual-gc-eval disable-manual-gc-eval", (),
     "it changes no result; Python collects garbage itself"),
    **_rows("manual-gc-interval", (ANY,), "it changes no result; Python collects garbage itself"),
    **_rows("empty-unused-memory-level", ("0",), "memory stays with the allocator", "remove the flag"),
}  # fmt: skip
"""A flag that is accepted because what it asks for is always so."""

NEEDS: dict[str, tuple[str, int | tuple[str, ...]]] = {
    "group-query-attention": ("num_query_groups", 1),
    "use-distributed-optimizer": ("zero_stage", 1),
    "no-position-embedding": ("position_embedding_type", ("rope", "none")),
}
"""Flags without effect that stand for nothing unless this field is given, and at least so large or one of these."""
