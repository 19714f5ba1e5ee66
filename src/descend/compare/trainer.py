"""What a comparison asks of a way to train: one step at a time, with its costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from torch.optim import Optimizer

from descend.compare.tasks.task import Batch


class Step(NamedTuple):
    """What one step cost.

    Args:
        loss: training loss before the step, of its batch.
        evaluations: gradients evaluated in it.
        parts: seconds by part, as in ``records.Run.parts``; empty if they cannot be told apart.
    """

    loss: float
    evaluations: int
    parts: Mapping[str, float]


class Trainer(Protocol):
    """Trains a model in place.

    Attributes:
        optimizers: the optimizers it steps, whose state counts as memory; empty for solvers that keep theirs.
        stopped: why there is nothing more to do, in words; None while there is.
    """

    @property
    def optimizers(self) -> Sequence[Optimizer]: ...

    @property
    def stopped(self) -> str | None: ...

    def step(self, batch: Batch) -> Step:
        """Take one step on ``batch``."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Inside, the model has the weights that it should be judged by."""
