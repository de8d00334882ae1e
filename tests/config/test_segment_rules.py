"""What segment recurrence and samples in their order do not go with."""

import re

import pytest

from megalm.config.hugging_face import architecture_of
from megalm.config.merging.load import load_config
from megalm.errors import ConfigError

RUN = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --micro-batch-size 1 --train-iters 1 "
    "--lr 0.1 --vocab-size 99 --sampling consecutive --global-batch-size 4"
)
MEMORY = f"{RUN} --segment-memory 8"
RELATIVE = f"{MEMORY} --mock-data --position-embedding-type relative"
ROPE = f"{MEMORY} --mock-data --position-embedding-type rope"


@pytest.mark.parametrize(
    "flags",
    [
        RELATIVE,
        f"{RELATIVE} --tensor-model-parallel-size 2 --zero-stage 3 --recompute-granularity full --qk-layernorm",
        f"{ROPE} --num-query-groups 1 --window-size 20,0 --attn-logit-softcapping 5 --max-position-embeddings 16",
        f"{MEMORY} --mock-data --position-embedding-type none --eod-mask-loss",
        f"{RUN} --mock-data",
    ],
)
def test_what_goes_together(flags):
    load_config(flags.split())


REFUSED = [
    (
        f"{ROPE} --sampling shuffle",
        r"segment_memory=8 needs samples that go on .* not sampling=shuffle; give --sampling",
    ),
    (f"{ROPE} --sampling stream", r"not sampling=stream"),
    (f"{ROPE} --objective prefix", r"segment_memory=8 is for texts as they stand, which objective=prefix changes"),
    (f"{ROPE} --objective-mixture causal:0.5,fim:0.5", r"objective=fim changes"),
    (f"{ROPE} --reset-attention-mask", r"reset_attention_mask=true parts the documents, and segment_memory=8 reaches"),
    (f"{ROPE} --reset-position-ids", r"reset_position_ids=true parts"),
    (f"{MEMORY} --mock-data", r"position_embedding_type=learned_absolute gives .* relative or rope"),
    (f"{ROPE} --max-position-embeddings 32", r"max_position_embeddings=32 must be seq_length=16 with segment_memory=8"),
    (f"{RELATIVE} --num-query-groups 1", r"position_embedding_type=relative has no num_query_groups=1"),
    (f"{RELATIVE} --window-size 4,0", r"window_size is not there with position_embedding_type=relative"),
    (f"{RELATIVE} --attn-logit-softcapping 5", r"attn_logit_softcapping is not there with"),
    (f"{RELATIVE} --relative-attention-num-buckets 8", r"relative_attention_num_buckets=8 is for model_family=t5"),
    (
        f"{ROPE} --pipeline-model-parallel-size 2",
        r"pipeline_model_parallel_size=2 does not go with segment_memory=8: st",
    ),
    (
        f"{ROPE} --tensor-model-parallel-size 2 --sequence-parallel",
        r"sequence_parallel=true does not go with segment_memory=8: a rank's part .* drop --sequence-parallel",
    ),
    (f"{ROPE} --mtp-num-layers 1", r"mtp_num_layers=1 does not go with segment_memory=8"),
    (
        f"{RUN} --mock-data --position-embedding-type relative",
        r"position_embedding_type=relative needs model_family=t5, or in a decoder segment_memory",
    ),
    (
        f"{RUN} --segment-memory 8 --mock-data --model-family bert --objective masked --position-embedding-type rope",
        r"segment_memory=8 is for model_family=gpt; drop one of them",
    ),
    (f"{RUN} --data-path a b", r"sampling=consecutive reads one dataset on, and data_path has 2; merge them into one"),
    (f"{RUN} --train-data-path a --valid-data-path b c", r"valid_data_path has 2"),
    (f"{RUN} --data-path a --full-validation", r"full_validation=true does not go with sampling=consecutive"),
    (
        f"{RUN.replace('--train-iters 1', '--train-samples 64')} --mock-data --rampup-batch-size 2 2 32",
        r"rampup_batch_size changes how many rows there are, of which sampling=consecutive lets each read on",
    ),
    (
        f"{RUN.replace('--train-iters 1', '--train-samples 64').replace('--global-batch-size 4', '')} --mock-data "
        "--step-batch-size-schedule 0:2,256:4",
        r"step_batch_size_schedule changes how many rows",
    ),
]


@pytest.mark.parametrize(("flags", "reason"), REFUSED, ids=[reason[:60] for _, reason in REFUSED])
def test_one_reason_for_what_does_not(flags, reason):
    with pytest.raises(ConfigError) as error:
        load_config(flags.split())
    (found,) = error.value.problems
    assert re.search(reason, found), found


@pytest.mark.parametrize("flags", [RELATIVE, f"{ROPE} --swiglu --disable-bias-linear --normalization RMSNorm"])
def test_no_class_of_transformers_has_a_memory(flags):
    with pytest.raises(ConfigError, match=r"no class of transformers has this model; .*segment_memory=8"):
        architecture_of(load_config(flags.split()).model)
