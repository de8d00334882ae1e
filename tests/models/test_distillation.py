"""A student beside its teacher: what "kd" is, and what a teacher has no part in."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megalm.config.model import ModelConfig
from megalm.models.families import FAMILIES
from megalm.models.token_model import Distillation, TokenModel
from megalm.testing.batches import batch_of

B, T, S, VOCAB = 2, 9, 7, 50
SIZES = {"vocab_size": VOCAB, "make_vocab_size_divisible_by": 16, "max_position_embeddings": 16}
GPT: dict[str, Any] = {"model_family": "gpt", "mtp_num_layers": 1, "attention_dropout": 0.1, "hidden_dropout": 0.1}
BERT: dict[str, Any] = {"model_family": "bert"}
T5: dict[str, Any] = {
    "model_family": "t5", "position_embedding_type": "relative", "normalization": "RMSNorm",
    "disable_bias_linear": True, "decoder_seq_length": T,
}  # fmt: skip


def model(family: dict[str, Any], layers: int, width: int, heads: int) -> TokenModel:
    config = ModelConfig(**SIZES, **family, num_layers=layers, hidden_size=width, num_attention_heads=heads)
    built = FAMILIES[config.model_family].build(config)
    generator = torch.Generator().manual_seed(layers)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    assert isinstance(built, TokenModel)
    return built


def taught(family: dict[str, Any], **settings: Any) -> TokenModel:
    """A student of two layers with a teacher of three, which is wider."""
    student, teacher = model(family, 2, 16, 2), model(family, 3, 24, 4)
    given = {"temperature": 2.0, "top_k": None, "weight": 0.7, "skip_lm_loss": False} | settings
    student.learn_from(Distillation(teacher=teacher.requires_grad_(False).eval(), **given))
    return student


def batch(family: dict[str, Any]) -> Any:
    generator = torch.Generator().manual_seed(5)
    tokens, labels, read = (torch.randint(VOCAB, shape, generator=generator) for shape in ((B, T), (B, T), (B, S)))
    mask = (torch.rand(B, T, generator=generator) > 0.4).float()
    own = {"tokens": read, "decoder_tokens": tokens} if family is T5 else {"tokens": tokens}
    if family is BERT:
        own["is_random"] = torch.tensor([0, 1])
    return batch_of(labels=labels, seed=3, loss_mask=mask, **own)


@pytest.mark.parametrize("family", [GPT, BERT, T5], ids=["gpt", "bert", "t5"])
def test_kd_is_the_formula_over_the_tokens_of_the_loss(family: dict[str, Any]) -> None:
    student, rows = taught(family).eval(), batch(family)
    alone = model(family, 2, 16, 2).eval()
    found, kd = student(rows), student.distillation
    assert kd is not None
    q, p = ((m(rows, wants_logits=True)[..., :VOCAB] / 2).log_softmax(-1) for m in (alone, kd.teacher))
    expected = 4 * F.kl_div(q, p, reduction="none", log_target=True).sum(-1) * rows["loss_mask"]
    torch.testing.assert_close(found["kd"], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(student.counts(rows)["kd"], rows["loss_mask"])
    for name, loss in alone(rows).items():  # the others are as without a teacher
        torch.testing.assert_close(found[name], loss)
    assert student.loss_weights == {**alone.loss_weights, "kd": 0.7}


def test_the_teacher_is_no_part_of_the_student() -> None:
    student, rows = taught(GPT), batch(GPT)
    assert student.state_dict().keys() == model(GPT, 2, 16, 2).state_dict().keys()
    student.train()
    kd = student.distillation
    assert kd is not None
    losses = student(rows)
    logits = kd.logits(rows)
    assert torch.equal(logits, kd.logits(rows)), "without dropout, and without what the student draws"
    assert not kd.teacher.training
    losses["kd"].sum().backward()
    assert all(p.grad is None for p in kd.teacher.parameters())
    assert student.embedding.tokens.weight.grad.abs().sum() > 0


def test_a_teacher_does_not_change_what_the_student_draws() -> None:
    student, alone, rows = taught(GPT).train(), model(GPT, 2, 16, 2).train(), batch(GPT)
    for name, loss in alone(rows).items():
        torch.testing.assert_close(student(rows)[name], loss, rtol=0, atol=1e-6)


def test_the_objective_may_weigh_nothing() -> None:
    student = taught(GPT, skip_lm_loss=True)
    assert student.loss_weights == {"lm": 0.0, "mtp_1": 0.0, "kd": 0.7}


def test_likeliest_tokens_alone() -> None:
    student, rows = taught(GPT, top_k=4).eval(), batch(GPT)
    whole = taught(GPT, top_k=VOCAB).eval()(rows)["kd"]
    torch.testing.assert_close(whole, taught(GPT).eval()(rows)["kd"], rtol=1e-4, atol=1e-5)
    assert (student(rows)["kd"].sum() - whole.sum()).abs() > 1e-3
