"""Drivers decide when parameters step. The ordinary one: all of them, when ``step`` is called."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from descend.core.optimizer import MethodOptimizer
from descend.sparse.attach import Tables
from descend.step.plan import Plan
from descend.step.take import take_step


class Driver(ABC):
    """Takes the steps of a ``FirstOrder``.

    Attributes:
        takes_scaler: whether a ``GradScaler`` leaves unscaling and overflows to ``step``.
        handle: what users hold to end it; None if there is nothing to end.
    """

    takes_scaler: ClassVar[bool] = False
    handle: Any = None

    @abstractmethod
    def step(self, optimizer: MethodOptimizer) -> None:
        """Called when the program calls ``step``: take or complete the step."""

    @abstractmethod
    def watch(self) -> None:
        """Called when parameters have joined the optimizer."""

    @abstractmethod
    def forget_plan(self) -> None:
        """Called when options, groups or state have been replaced: the next step makes a new plan."""


class WholeStep(Driver):
    """All parameters step when ``step`` is called.

    Args:
        tables: the optimizer's parameters in exact mode.
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._plan: Plan | None = None

    def step(self, optimizer: MethodOptimizer) -> None:
        plan, self._plan = self._plan, None  # dropped if the step raises
        try:
            self._plan = take_step(optimizer, self._tables, plan)
        finally:  # Ctrl-C comes when the step has been taken
            if optimizer.observer is not None:
                optimizer.observer.end_step()

    def watch(self) -> None:
        """Nothing to do: the next step notices that the plan lacks them."""

    def forget_plan(self) -> None:
        self._plan = None
