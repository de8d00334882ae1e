"""Multi-token prediction: what each module reads and is to say, and what its losses weigh."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megalm.checkpoint.hugging_face.tensors import Correspondence
from megalm.config.hugging_face import architecture_of
from megalm.config.merging.load import load_config
from megalm.errors import CheckpointError, ConfigError
from megalm.models.blocks.rotary import RotaryTables
from megalm.models.gpt.flops import training_flops_per_token
from megalm.models.gpt.mtp import shifted, weights_ahead
from megalm.testing.batches import batch_of

RUN = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --micro-batch-size 1 --train-iters 1 "
    "--lr 0.1 --mock-data --vocab-size 99 --mtp-num-layers 2"
)
T, DEPTHS = 11, 2


@pytest.fixture
def config(style_config):
    return style_config.model_copy(update={"mtp_num_layers": DEPTHS, "mtp_loss_scaling_factor": 0.3})


def texts(config, length=T):
    return torch.randint(0, config.vocab_size, (2, length + 1), generator=torch.Generator().manual_seed(0))


def losses_of(model, tokens, **fields):
    return model(batch_of(tokens[:, :-1], tokens[:, 1:], **fields))


def test_each_depth_is_the_formula_of_the_paper(config, build):
    """norm(layer(W [norm(embedding ahead); norm(h)])), the head of the model, the label further on."""
    model, tokens = build(config), texts(config)
    found = losses_of(model, tokens)
    assert model.loss_weights == {"lm": 1.0, "mtp_1": 0.15, "mtp_2": 0.15}
    batch = batch_of(tokens[:, :-1], tokens[:, 1:])
    h = model.final_norm(model.run_layers(model.embed(batch), batch)[0])
    plain = {name: value for name, value in found.items() if name == "lm"}
    torch.testing.assert_close(plain["lm"], build(config.model_copy(update={"mtp_num_layers": 0}))(batch)["lm"])
    for depth in (1, 2):
        module, length = model.mtp_layers[depth - 1], T - depth
        positions = torch.arange(depth, T)[None]
        ahead = model.embedding(tokens[:, depth:T], positions)
        joined = torch.cat((module.embedding_norm(ahead), module.hidden_norm(h[:, :length])), -1)
        rotary = RotaryTables.of(config, torch.arange(length)[None])
        h = module.final_norm(module.layer(module.projection(joined), rotary=rotary and rotary.all))
        logits = model.head(h, embedding=model.embedding.tokens) if config.tied else model.head(h)
        expected = -logits[..., : config.vocab_size].log_softmax(-1)
        expected = expected.gather(-1, tokens[:, depth + 1 :, None])[..., 0]
        torch.testing.assert_close(found[f"mtp_{depth}"][:, :length], expected)
        assert (found[f"mtp_{depth}"][:, length:] == 0).all(), "the row ends"
        assert model.counts(batch)[f"mtp_{depth}"].sum() == 2 * length


def test_no_depth_sees_what_it_is_to_predict(config, build):
    model, tokens = build(config), texts(config)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % config.vocab_size
    before, after = losses_of(model, tokens), losses_of(model, changed)
    for depth in (1, 2):
        differs = (before[f"mtp_{depth}"] != after[f"mtp_{depth}"]).any(0)
        assert not differs[: 6 - depth].any(), "position i predicts token i + depth + 1"
        assert differs[6 - depth]


def test_documents_end_what_is_ahead():
    ends = torch.tensor([[0, 4, 9, *[T] * (T - 2)], [0, *[T] * T]], dtype=torch.int32)
    batch = batch_of(torch.zeros(2, T, dtype=torch.long), torch.zeros(2, T, dtype=torch.long), cu_seqlens=ends)
    assert weights_ahead(batch, 1).int().tolist() == [[1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 0], [1] * 10 + [0]]
    assert weights_ahead(batch, 2).int().tolist() == [[1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0], [1] * 9 + [0, 0]]
    assert shifted(torch.arange(4)[None], 1).tolist() == [[1, 2, 3, 0]]


@pytest.mark.parametrize("has_documents", [False, True])
def test_tokens_labels_and_weights_ahead_are_megatrons(has_documents):
    """Whose `roll_tensor` moves each one place further on at every depth; in packed rows inside each sequence."""
    peer = pytest.importorskip(
        "megatron.core.transformer.multi_token_prediction", reason="pip install megatron-core==0.16.*"
    )
    edges, generator = [0, 4, 9, T], torch.Generator().manual_seed(1)
    rows = torch.randint(1, 99, (1, T), generator=generator)
    weights = (torch.rand(1, T, generator=generator) > 0.3).float()
    fields = {"cu_seqlens": torch.tensor([[*edges, *[T] * (T - 3)]], dtype=torch.int32)} if has_documents else {}
    batch = batch_of(rows, rows, loss_mask=weights, **fields)
    packed = SimpleNamespace(cu_seqlens_q=torch.tensor(edges)) if has_documents else None
    theirs, their_weights = rows, weights
    for depth in range(1, 4):
        theirs, _ = peer.roll_tensor(theirs, packed_seq_params=packed)
        their_weights, _ = peer.roll_tensor(their_weights, packed_seq_params=packed)
        ours = weights_ahead(batch, depth)
        assert torch.equal(ours, their_weights)
        inside = theirs != 0  # behind the end of a document ours reads on, and weighs it nothing
        assert torch.equal(shifted(rows, depth)[inside], theirs[inside])
        assert not ours[~inside].any()


def test_operations_equal_those_that_torch_counts(config, build):
    model, tokens = build(config), texts(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        losses = losses_of(model, tokens)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        sum(loss.sum() for loss in losses.values()).backward()
    total = (forward.get_total_flops() + backward.get_total_flops()) / (2 * T)
    expected = training_flops_per_token(config, T, causal=False)
    assert total == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--pipeline-model-parallel-size 2", "its modules read the embeddings, which the last stage lacks"),
        ("--objective prefix", "does not go with objective=prefix"),
        ("--objective-mixture causal:1,prefix:1", "does not go with objective=prefix"),
        ("--mtp-num-layers 16", "leaves no target in seq_length=16"),
        ("--mtp-num-layers -1", "mtp_num_layers=-1"),
        ("--mtp-num-layers 0 --mtp-loss-scaling-factor 0.3", "is for mtp_num_layers >= 1"),
        ("--model-family bert --objective masked", "mtp_num_layers=2 is for model_family=gpt"),
    ],
)
def test_what_does_not_go_together_is_one_problem(flags, expected):
    with pytest.raises(ConfigError) as error:
        load_config(f"{RUN} {flags}".split())
    (problem,) = error.value.problems
    assert expected in problem


def test_no_class_of_transformers_drops_them(style_config):
    config = style_config.model_copy(update={"mtp_num_layers": 1})
    with pytest.raises(ConfigError, match="mtp_num_layers=1"):
        architecture_of(config)
    with pytest.raises(CheckpointError, match=r"has no place for .*mtp_layers\."):
        Correspondence.of(config, "LlamaForCausalLM")
