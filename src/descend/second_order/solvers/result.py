"""What a solver returns, and why it stopped."""

from __future__ import annotations

import reprlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from torch import Tensor

X = TypeVar("X")


class Status(str, Enum):
    """Why a solver stopped; each member equals its own name, so that ``status == "converged"`` works."""

    converged = "converged"
    max_iter = "max_iter"
    max_eval = "max_eval"
    line_search_failed = "line_search_failed"
    non_finite = "non_finite"
    unbounded = "unbounded"
    stopped_by_callback = "stopped_by_callback"
    precision_limit = "precision_limit"
    infeasible = "infeasible"

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
        "bound the variables, work with logarithms, or look for NaN in the data."
    ),
    Status.unbounded: (
        "The function falls without end: it reached -infinity, or fell so far that no minimum can be expected. Bound "
        "the variables, add a penalty that grows with them, or check the sign of the function."
    ),
    Status.stopped_by_callback: "The callback asked to stop.",
    Status.precision_limit: (
        "The function changes by no more than its rounding error, while the gradient is still above tol: use a wider "
        "dtype (float64), rescale the function, or accept a larger tol."
    ),
    Status.infeasible: "The squared violation of the constraints has a local minimum here, not 0: start elsewhere.",
}


class Iteration(NamedTuple):
    """One entry of ``Result.history``: the point after an iteration; the first entry is the start.

    Attributes:
        fun: value of the function.
        grad_norm: largest absolute entry of the (projected) gradient.
        step: length of the step: in multiples of the search direction, or the 2-norm of Newton's step.
        n_eval: evaluations of the function and its gradient so far.
        n_hvp: Hessian-vector products so far.
    """

    fun: float
    grad_norm: float
    step: float
    n_eval: int
    n_hvp: int


@dataclass(frozen=True, repr=False, eq=False)
class Result(Generic[X]):
    """What ``minimize`` returns and ``optimizer.result`` holds.

    Attributes:
        x: the best point seen; same structure as ``x0``. Parameters are returned themselves, set to it. In torch's
            two modes of ``LBFGS`` it is the last point.
        fun: value of the function there.
        grad: gradient there; same structure as ``x``, a dict for a module.
        status: why the solver stopped.
        message: the same in words, with advice.
        success: whether the (projected) gradient met the tolerance.
        grad_norm: largest absolute entry of the (projected) gradient there.
        n_iter: iterations.
        n_eval: evaluations of the function with its gradient.
        n_hvp: products with the Hessian; a dense Hessian counts as one per variable.
        time: seconds.
        history: one ``Iteration`` for the start and one after each iteration.
        n_negative_curvature: iterations of Newton's methods that followed a direction of negative curvature.
    """

    x: X
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
        """Whether the (projected) gradient met the tolerance."""
        return self.status is Status.converged

    def __repr__(self) -> str:
        return (
            f"Result(status={self.status}, message={self.message!r}, x={shortened(self.x)}, fun={self.fun:.6g}, "
            f"grad_norm={self.grad_norm:.3g}, n_iter={self.n_iter}, n_eval={self.n_eval}, n_hvp={self.n_hvp}, "
            f"time={self.time:.3g} s)"
        )


class _Short(reprlib.Repr):
    """Tensors of a few elements with their values, others with shape and dtype; containers cut short."""

    def repr1(self, x: Any, level: int) -> str:
        if not isinstance(x, Tensor):
            return super().repr1(x, level)
        if x.numel() > self.maxlist:
            return f"tensor(shape={tuple(x.shape)}, dtype={x.dtype})"
        return " ".join(repr(x.detach()).split())


_SHORT = _Short()


def shortened(tree: Any) -> str:
    """A structure of tensors as a few words."""
    return _SHORT.repr(tree)


class Progress(NamedTuple):
    """What ``callback`` gets after each iteration.

    Attributes:
        x: the current point; same structure as ``x0``. Copies, except that parameters are passed themselves; what is
            written to them is undone.
        fun: value of the function there.
        grad: gradient there, copied; same structure.
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


class Evaluated(Protocol):
    """A point at which the function and its gradient are known."""

    @property
    def value(self) -> float: ...

    @property
    def grad(self) -> Tensor: ...

    @property
    def norm(self) -> float: ...


class Solver(Protocol):
    """A finished run of a solver."""

    history: list[Iteration]
    n_iter: int
    n_negative_curvature: int

    @property
    def best(self) -> Evaluated: ...

    @property
    def n_eval(self) -> int: ...

    @property
    def n_hvp(self) -> int: ...


def result_of(
    solver: Solver,
    status: Status,
    message: str,
    x: X,
    unflatten: Callable[[Tensor], Any],
    *,
    began: float,
    maximize: bool = False,
) -> Result[X]:
    """The result of a run.

    Args:
        solver: the run; its ``best`` point is the result.
        status, message: why it stopped.
        x: the best point as the caller gets it.
        unflatten: maps the flat gradient to its structure.
        began: ``time.perf_counter()`` at the start.
        maximize: whether the solver minimized the negative function.
    """
    best, sign = solver.best, -1 if maximize else 1
    return Result(
        x=x,
        fun=sign * best.value,
        grad=unflatten(-best.grad if maximize else best.grad),
        status=status,
        message=message,
        grad_norm=best.norm,
        n_iter=solver.n_iter,
        n_eval=solver.n_eval,
        n_hvp=solver.n_hvp,
        time=time.perf_counter() - began,
        history=[entry._replace(fun=-entry.fun) for entry in solver.history] if maximize else solver.history,
        n_negative_curvature=solver.n_negative_curvature,
    )
