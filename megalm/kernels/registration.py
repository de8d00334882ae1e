"""Fake implementations and gradients of the fused operators, for autograd, torch.compile and `opcheck`."""

from megalm.kernels import activation, attention, cross_entropy, dropout, embedding, norm, optimizer, rotary, softmax


def register() -> None:
    """Tell torch about every operator of the loaded library; call once."""
    for module in (activation, attention, cross_entropy, dropout, embedding, norm, optimizer, rotary, softmax):
        module.register()
