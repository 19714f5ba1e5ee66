"""The limits of a run, and its counts of evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from descend.second_order.problem.objective import Point
from descend.second_order.solvers.result import Solver


class Limits(NamedTuple):
    """The limits and the callback that end a run; as in ``Run``."""

    tol: float
    max_iter: float
    max_eval: float
    callback: Callable[[Solver, Point], bool] | None


class Counted(Protocol):
    """An objective that counts."""

    n_eval: int
    n_hvp: int


class Budget:
    """Evaluations of an objective, counted from now on.

    Args:
        objective: the function.
        max_eval: evaluations at most.
    """

    def __init__(self, objective: Counted, max_eval: float) -> None:
        self._counted = objective
        self.last_eval = objective.n_eval + max_eval

    @property
    def n_eval(self) -> int:
        return self._counted.n_eval

    @property
    def n_hvp(self) -> int:
        return self._counted.n_hvp

    @property
    def evaluations_left(self) -> float:
        return self.last_eval - self._counted.n_eval
