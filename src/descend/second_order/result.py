"""What a minimisation returns, and why it stopped."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple


class Status(str, Enum):
    """Why a solver stopped; each member equals its own name, so that ``status == "converged"`` works."""

    converged = "converged"
    max_iter = "max_iter"
    max_eval = "max_eval"
    line_search_failed = "line_search_failed"
    non_finite = "non_finite"
    stopped_by_callback = "stopped_by_callback"
    precision_limit = "precision_limit"

    def __str__(self) -> str:
        return self.value


MESSAGES = {
    Status.converged: "The largest entry of the (projected) gradient is at most tol * max(1, its value at the start).",
    Status.max_iter: "The limit of iterations was reached: raise max_iter, or go on from this point.",
    Status.max_eval: "The limit of evaluations was reached: raise max_eval, or go on from this point.",
    Status.line_search_failed: (
        "No step along the last two directions lowered the function enough: the gradient may be wrong or may jump (a "
        "kink, dropout), or the function is unbounded below. torch.autograd.gradcheck compares it with differences."
    ),
    Status.non_finite: (
        "The function or its gradient is NaN or infinite at the start or wherever a step could lead: start elsewhere, "
        "bound the variables, or work with logarithms."
    ),
    Status.stopped_by_callback: "The callback asked to stop.",
    Status.precision_limit: (
        "The function changes by no more than its rounding error, while the gradient is still above tol: use a wider "
        "dtype (float64), rescale the function, or accept a larger tol."
    ),
}


class Iteration(NamedTuple):
    """One entry of ``Result.history``: where the solver stood after an iteration (the first one: at the start).

    Attributes:
        fun: value of the function.
        grad_norm: largest absolute entry of the (projected) gradient.
        step: how far the iteration went: times the direction of a line search, or the length of Newton's step.
        n_eval: evaluations of the function and its gradient so far.
        n_hvp: Hessian-vector products so far.
    """

    fun: float
    grad_norm: float
    step: float
    n_eval: int
    n_hvp: int


@dataclass(frozen=True)
class Result:
    """What ``minimize`` returns and ``optimizer.result`` holds.

    Attributes:
        x: the best point seen; same structure as ``x0``. Parameters are returned themselves, holding it.
        fun: value of the function there.
        grad: gradient there; same structure as ``x``.
        status: why it stopped.
        message: the same in words, with advice.
        success: whether the (projected) gradient met ``tol``.
        grad_norm: largest absolute entry of the (projected) gradient at ``x``.
        n_iter: iterations.
        n_eval: evaluations of the function with its gradient.
        n_hvp: products with the Hessian; a dense Hessian counts as one per variable.
        time: seconds.
        history: one ``Iteration`` for the start and one after each iteration.
        n_negative_curvature: iterations of Newton's methods that went down a direction of negative curvature.
    """

    x: Any
    fun: float
    grad: Any
    status: Status
    message: str
    grad_norm: float
    n_iter: int
    n_eval: int
    n_hvp: int
    time: float
    history: list[Iteration]
    n_negative_curvature: int = 0

    @property
    def success(self) -> bool:
        """Whether the (projected) gradient met ``tol``."""
        return self.status is Status.converged

    def __repr__(self) -> str:
        return (
            f"Result(status={self.status}, fun={self.fun:.6g}, grad_norm={self.grad_norm:.3g}, n_iter={self.n_iter}, "
            f"n_eval={self.n_eval}, n_hvp={self.n_hvp}, time={self.time:.3g} s)"
        )


class Progress(NamedTuple):
    """What ``callback`` is told after each iteration.

    Attributes:
        x: the current point; same structure as ``x0``; not to be written to.
        fun: value of the function there.
        grad: gradient there; same structure.
        grad_norm: largest absolute entry of the (projected) gradient.
        n_iter, n_eval, n_hvp: counts so far.
    """

    x: Any
    fun: float
    grad: Any
    grad_norm: float
    n_iter: int
    n_eval: int
    n_hvp: int
