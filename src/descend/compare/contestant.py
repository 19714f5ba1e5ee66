"""What a comparison asks of an optimizer that was named on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from descend.compare.problem import Problem
from descend.compare.trainer import Trainer


class Contestant(Protocol):
    """One optimizer of a comparison.

    Attributes:
        label: its name in tables; unique.
        text: what the user wrote.
        name: the full name of its class, or its library and method.
        options: those that the user gave, and defaults of the task; what the library adds is not among them.
        lr: its learning rate; None if it has none, or if that is its class's default.
        is_sparse: whether it is meant for sparse gradients.
    """

    @property
    def label(self) -> str: ...

    @property
    def text(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def options(self) -> Mapping[str, Any]: ...

    @property
    def lr(self) -> float | None: ...

    @property
    def is_sparse(self) -> bool: ...

    def with_lr(self, lr: float) -> Contestant:
        """Return the same with another learning rate; raise a ``UsageError`` if it has none."""

    def trainer(self, model: nn.Module, problem: Problem) -> Trainer:
        """Return what trains ``model`` in place, a copy of ``problem.model``.

        Raises:
            UsageError: if the optimizer rejects its options, the model or the task.
        """


def full_name(kind: type) -> str:
    """Return the name of a class with its module's."""
    return f"{kind.__module__}.{kind.__qualname__}"
