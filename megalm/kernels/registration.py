"""The table of the fused operators: what torch is told of each, and how each is checked."""

from typing import Protocol

from megalm.kernels import activation, attention, cross_entropy, dropout, embedding, norm, optimizer, rotary, self_test


class Operator(Protocol):
    """What an operator's file has beside its public functions."""

    CHECKS: tuple[self_test.Check, ...]
    """Its numbers beside the reference's."""

    def register(self) -> None:
        """Tell torch its fake implementations and gradients, for autograd, torch.compile and `opcheck`."""


OPERATORS: tuple[Operator, ...] = (norm, rotary, activation, dropout, embedding, cross_entropy, attention, optimizer)


def register() -> None:
    """Tell torch about every operator of the loaded library; call once."""
    for operator in OPERATORS:
        operator.register()


def first_failure(device: str = "cpu") -> str | None:
    """Name of the first kernel whose numbers on `device` are wrong, or None."""
    return self_test.first_failure((check for operator in OPERATORS for check in operator.CHECKS), device)
