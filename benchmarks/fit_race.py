"""Who fits, and what it costs: residuals and Jacobians counted outside of the solvers, one rule for all.

- **One function.** Everybody gets residuals and Jacobians from the same ``FitCounter``. An evaluation of either is
  one; the same again at the same point is free, since SciPy's interface to MINPACK begins with that.
- **One finish.** A run is solved at the first point within bounds that is evaluated and

  - has six digits of every certified parameter, where there are such;
  - else has the lowest known sum of squares, to 1e-5 of it and 1e-14;
  - or is stationary: no column of the Jacobian has a cosine above 1e-6 with the residuals. Where a variable may move
    less than its own least-squares step, because of a bound, the cosine is smaller by that. The measure depends on
    the units of no variable and of no residual. A point is not stationary if a column has faded to less than 1e-10 of
    the residuals: models that are constant far away would be fitted there.

- **One budget** of residuals and Jacobians together.
- **Own tolerances are off**, or as tight as allowed: the precision. ``default_options`` lets everybody stop by himself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import torch
from numpy.typing import NDArray
from problems.fit import Fit
from race import OURS, Ending, Finish, Outcome
from torch import Tensor

import descend

DIGITS = 6.0
STATIONARY = 1e-6
FADED = 1e-10
TIGHTEST = 2.3e-16  # SciPy refuses less than the precision
ENDLESS = 1_000_000
Array = NDArray[np.float64]


class FitCounter:
    """A fit whose evaluations are counted, and ended at the finish.

    Args:
        fit: the problem.
        budget: evaluations at most.
        ends: whether to stop the run at the finish; otherwise solvers stop by themselves.
    Attributes:
        n_residuals, n_jacobians: evaluations.
        solved: whether a point met the finish.
        outside: whether a point was out of bounds.
        lowest: least sum of squares of a point within bounds.
    """

    def __init__(self, fit: Fit, budget: int, *, ends: bool = True) -> None:
        self.fit, self.budget, self.ends = fit, budget, ends
        self.n_residuals = self.n_jacobians = 0
        self.solved = self.outside = False
        self.lowest = float("inf")
        self.last: dict[str, tuple[Tensor, Tensor]] = {}
        self.is_live = exact_jacobian(fit, fit.x0).norm(dim=0) > 0

    @property
    def cost(self) -> int:
        return self.n_residuals + self.n_jacobians

    def residuals(self, x: Tensor) -> Tensor:
        def evaluate(x: Tensor) -> Tensor:
            self.n_residuals += 1
            residuals = self.fit.residuals(x)
            self.look_at(x, residuals)
            return residuals

        return self.counted("residuals", evaluate, x)

    def jacobian(self, x: Tensor) -> Tensor:
        def evaluate(x: Tensor) -> Tensor:
            self.n_jacobians += 1
            return exact_jacobian(self.fit, x)

        return self.counted("jacobian", evaluate, x)

    def counted(self, name: str, evaluate: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        x = x.detach().clone()
        if name not in self.last or not torch.equal(self.last[name][0], x):
            if self.cost >= self.budget:
                raise Finish
            self.last[name] = x, evaluate(x)
        return self.last[name][1].clone()

    def look_at(self, x: Tensor, residuals: Tensor) -> None:
        """Notice whether a point is out of bounds, and end the run if it is the finish."""
        if is_outside(self.fit, x):
            self.outside = True
            return
        value = residuals.square().sum().item()
        if value < self.lowest:
            self.lowest = value
            if self.ends and self.is_finish(x, residuals, value):
                self.solved = True
                raise Finish

    def is_finish(self, x: Tensor, residuals: Tensor, value: float) -> bool:
        if self.fit.certified is not None:
            return self.fit.certified.digits(x) >= DIGITS
        if self.fit.minima is not None and value <= min(self.fit.minima) * (1 + 1e-5) + 1e-14:
            return True
        jacobian = exact_jacobian(self.fit, x)
        columns, size = jacobian.norm(dim=0), residuals.norm()
        has_faded = columns * x.abs().clamp(min=1) < FADED * size
        return (
            not bool((has_faded & self.is_live).any()) and stationarity(self.fit, x, residuals, jacobian) <= STATIONARY
        )

    def array(self, x: Array) -> Array:
        """``residuals`` for SciPy."""
        residuals: Array = self.residuals(torch.tensor(x)).numpy()
        return residuals

    def jacobian_array(self, x: Array) -> Array:
        """``jacobian`` for SciPy."""
        jacobian: Array = self.jacobian(torch.tensor(x)).numpy()
        return jacobian


def exact_jacobian(fit: Fit, x: Tensor) -> Tensor:
    jacobian: Tensor = torch.func.jacfwd(fit.residuals)(x)
    return jacobian.detach()


def stationarity(fit: Fit, x: Tensor, residuals: Tensor, jacobian: Tensor) -> float:
    """The largest cosine of a column and the residuals, or what the bounds leave of it; 0 for residuals of zero."""
    columns = jacobian.norm(dim=0)
    steps = torch.where(columns > 0, jacobian.T @ residuals / columns.square(), 0.0)
    if fit.lower is not None and fit.upper is not None:
        steps = torch.clamp(steps, x - fit.upper, x - fit.lower)
    size = residuals.norm().item()
    return (steps * columns).abs().max().item() / size if size else 0.0


def is_outside(fit: Fit, x: Tensor) -> bool:
    if fit.lower is None or fit.upper is None:
        return False
    return bool(((x < fit.lower) | (x > fit.upper)).any())


FitSolver = Callable[[FitCounter], Ending]


def ours(counter: FitCounter, **options: Any) -> Ending:
    fit = counter.fit
    bounds = None if fit.lower is None else (fit.lower, fit.upper)
    result = descend.least_squares(counter.residuals, fit.x0, bounds=bounds, jac=counter.jacobian, **options)
    return Ending(result.x, 2 * result.fun, result.success)


def scipy_solver(counter: FitCounter, method: str, **options: Any) -> Ending:
    fit = counter.fit
    if fit.lower is not None and fit.upper is not None:
        options["bounds"] = fit.lower.numpy(), fit.upper.numpy()
    result = scipy.optimize.least_squares(
        counter.array, fit.x0.numpy(), counter.jacobian_array, method=method, **options
    )
    return Ending(torch.tensor(result.x), 2 * float(result.cost), bool(result.success))


TRF = "SciPy trf"
TRF_SCALED = "SciPy trf, x_scale=jac"
DOGBOX = "SciPy dogbox"
LM = "SciPy lm (MINPACK)"
UNITS: dict[str, dict[str, Any]] = {
    TRF: dict(method="trf"),
    TRF_SCALED: dict(method="trf", x_scale="jac"),
    DOGBOX: dict(method="dogbox"),
    LM: dict(method="lm"),
}


def tight_options() -> dict[str, FitSolver]:
    """Everybody with tolerances as small as allowed, and no limit of evaluations."""
    tight: dict[str, Any] = dict(ftol=TIGHTEST, xtol=TIGHTEST, gtol=TIGHTEST, max_nfev=ENDLESS)
    peers = {name: partial(scipy_solver, **units, **tight) for name, units in UNITS.items()}
    return {OURS: partial(ours, tol=0.0, max_iter=ENDLESS), **peers}


def default_options() -> dict[str, FitSolver]:
    """Everybody as a user calls it who gives the Jacobian."""
    return {OURS: ours, **{name: partial(scipy_solver, **units) for name, units in UNITS.items()}}


class FitOutcome(NamedTuple):
    """What one solver did with one fit.

    Attributes:
        outcome: as in other races; its ``cost`` is of residuals and Jacobians together.
        n_jacobians: how many of them were Jacobians.
        lowest: least sum of squares of an evaluated point.
        digits: of the certified parameters that the returned point has; 0 if the run did not end by itself.
    """

    outcome: Outcome
    n_jacobians: int
    lowest: float
    digits: float = 0.0


def run(solver: FitSolver, fit: Fit, budget: int, *, ends: bool = True) -> FitOutcome:
    """Let one solver loose on one fit."""
    counter = FitCounter(fit, budget, ends=ends)

    def finished(outcome: Outcome, digits: float = 0.0) -> FitOutcome:
        return FitOutcome(outcome, counter.n_jacobians, counter.lowest, digits)

    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            ending = solver(counter)
    except Finish:
        return finished(Outcome(counter.cost, counter.solved, outside=counter.outside))
    except Exception as error:  # a peer's crash is a result
        text = f"{type(error).__name__}: {error}"
        return finished(Outcome(counter.cost, False, early=True, outside=counter.outside, error=text))
    nan = bool(ending.x.isnan().any()) or ending.value != ending.value
    outside = counter.outside or is_outside(fit, ending.x)
    digits = 0.0 if fit.certified is None else fit.certified.digits(ending.x)
    return finished(Outcome(counter.cost, False, True, ending.success, nan, outside), digits)


def begins_solved(fit: Fit) -> bool:
    """Whether the start already meets the finish: nothing to measure."""
    try:
        FitCounter(fit, budget=1).residuals(fit.x0)
    except Finish:
        return True
    return False
