"""Solvers that minimize a function in a loop of their own: ``descend.minimize``, and elsewhere its peers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import nn

import descend
from descend.compare.closures import check_alone, no_lr
from descend.compare.handoff import End, Iterate, Report, SolverTrainer
from descend.compare.problem import Problem
from descend.compare.tasks.task import Batch, Loss
from descend.reporting.errors import UsageError


class Library(Protocol):
    """Solvers from one library.

    Attributes:
        name: of the function or class that runs them.
        methods: their names.
    """

    name: str
    methods: Collection[str]

    def check(self, method: str, options: Mapping[str, Any], problem: Problem) -> None:
        """Raise an exception that says which option is wrong, or which task is needed."""

    def solve(
        self, method: str, options: Mapping[str, Any], model: nn.Module, loss: Loss, batch: Batch, report: Report
    ) -> End:
        """Train ``model`` in place, with a call of ``report`` after each iteration."""


@dataclass(frozen=True)
class SolverSpec:
    """A solver in a comparison; see ``Contestant``.

    Args:
        library: runs it.
        method: the library's name for it.
    """

    label: str
    text: str
    library: Library
    method: str
    options: Mapping[str, Any]
    lr: float | None = None
    is_sparse: bool = False

    @property
    def name(self) -> str:
        return f"{self.library.name}: {self.method}"

    def with_lr(self, lr: float) -> NoReturn:
        """Raise a ``UsageError``: a line search finds the length of a step."""
        raise no_lr(self.text)

    def trainer(self, model: nn.Module, problem: Problem) -> SolverTrainer:
        """Return what trains ``model`` in place.

        Raises:
            UsageError: if the library rejects an option or the task, batches differ, or several processes share them.
        """
        check_alone(self.text, problem)
        if problem.batch_size:
            raise UsageError(
                f"--optimizer {self.text} needs the same data in each step, but {problem.task.name} trains on batches "
                f"of {problem.batch_size}: give lbfgs, newton or torch.lbfgs, or a task with all data in each step."
            )
        try:
            self.library.check(self.method, self.options, problem)
        except Exception as error:  # a library may reject an option with any exception
            raise UsageError(f"--optimizer {self.text}: {error}") from error
        loss = problem.task.loss

        def solve(batch: Batch, report: Report) -> End:
            return self.library.solve(self.method, self.options, model, loss, batch, report)

        return SolverTrainer(lambda batch: loss(model, batch).item(), solve)


class Minimize:
    """``descend.minimize``."""

    name = "descend.minimize"
    methods: Collection[str] = ("gd", "bfgs", "ss-bfgs", "ss-broyden", "l-bfgs", "newton-cg", "newton")

    def check(self, method: str, options: Mapping[str, Any], problem: Problem) -> None:
        descend.minimize(torch.square, torch.zeros(()), method, **options)  # type: ignore[call-overload]

    def solve(
        self, method: str, options: Mapping[str, Any], model: nn.Module, loss: Loss, batch: Batch, report: Report
    ) -> End:
        def callback(progress: descend.Progress) -> None:
            report(Iterate(progress.fun, progress.n_eval + progress.n_hvp))

        result = descend.minimize(  # type: ignore[call-overload]
            lambda _: loss(model, batch),
            model,
            method,
            callback=callback,
            **options,
        )
        return End(result.message, result.n_eval + result.n_hvp)
