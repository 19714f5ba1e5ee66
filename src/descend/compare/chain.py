"""One optimizer after another on the same model: ``adam:steps=300+lbfgs``."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from descend.compare.closures import check_alone
from descend.compare.contestant import Contestant
from descend.compare.problem import Problem
from descend.compare.tasks.task import Batch
from descend.compare.trainer import Step, Trainer


@dataclass(frozen=True)
class ChainSpec:
    """A chain in a comparison; see ``Contestant``.

    Args:
        stages: the optimizers, at least two.
        steps: how many steps each of them takes; the last takes all that are left.
    """

    label: str
    text: str
    stages: Sequence[Contestant]
    steps: Sequence[int]
    is_sparse: bool = False

    @property
    def name(self) -> str:
        return ", then ".join(stage.name for stage in self.stages)

    @property
    def options(self) -> Mapping[str, Any]:
        """The options of all stages; each has its stage's number in front."""
        numbered = enumerate(self.stages, 1)
        return {f"{i}.{name}": value for i, stage in numbered for name, value in stage.options.items()}

    @property
    def lr(self) -> float | None:
        return self.stages[0].lr

    def with_lr(self, lr: float) -> ChainSpec:
        """Return the same with another learning rate of the first stage."""
        return replace(self, stages=[self.stages[0].with_lr(lr), *self.stages[1:]])

    def trainer(self, model: nn.Module, problem: Problem) -> ChainTrainer:
        """Return what trains ``model`` in place; raise a ``UsageError`` if one of the stages cannot."""
        check_alone(self.text, problem)
        for stage in self.stages[1:]:
            stage.trainer(copy.deepcopy(model), problem)  # so that it raises its errors now
        return ChainTrainer(model, problem, self.stages, self.steps)


class ChainTrainer:
    """Trains with one stage after another. A stage that stops early gives its place to the next."""

    def __init__(self, model: nn.Module, problem: Problem, stages: Sequence[Contestant], steps: Sequence[int]) -> None:
        self._model, self._problem = model, problem
        self._later = list(zip(stages[1:], [*steps[1:], None], strict=True))
        self._trainer: Trainer = stages[0].trainer(model, problem)
        self._left: int | None = steps[0]

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        return self._trainer.optimizers

    @property
    def stopped(self) -> str | None:
        return None if self._later else self._trainer.stopped

    def step(self, batch: Batch) -> Step:
        """Take one step of the present stage."""
        if self._later and (self._left == 0 or self._trainer.stopped):
            stage, self._left = self._later.pop(0)
            self._trainer = stage.trainer(self._model, self._problem)
        if self._left is not None:
            self._left -= 1
        return self._trainer.step(batch)

    def evaluating(self) -> AbstractContextManager[None]:
        """Inside, the model has the weights that it should be judged by."""
        return self._trainer.evaluating()
