"""When an optimizer's parameters step: all together, when ``step`` is called."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from descend.core.method import Method
from descend.sparse.attach import Tables
from descend.step.plan import Plan
from descend.step.take import take_step


class Driver(ABC):
    """What ``FirstOrder`` leaves its steps to.

    Attributes:
        takes_scaler: whether a ``GradScaler`` shall leave everything to ``step``.
        handle: what users hold to end it; None if there is nothing to end.
    """

    takes_scaler: ClassVar[bool] = False
    handle: Any = None

    @abstractmethod
    def step(self, method: Method) -> None:
        """Do what is left to do when the program calls ``step``."""

    @abstractmethod
    def watch(self) -> None:
        """Parameters have joined the optimizer."""

    @abstractmethod
    def forget_plan(self) -> None:
        """Options, groups or state have been replaced: work out anew what a step does."""


class WholeStep(Driver):
    """All parameters step when ``step`` is called.

    Args:
        tables: the optimizer's parameters in exact mode.
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._plan: Plan | None = None

    def step(self, method: Method) -> None:
        plan, self._plan = self._plan, None  # should the step not end
        self._plan = take_step(method, self._tables, plan)

    def watch(self) -> None:
        """The plan notices."""

    def forget_plan(self) -> None:
        self._plan = None
