"""Solve Hock and Schittkowski's problems with `minimize`, SciPy's SLSQP and trust-constr.

    python benchmarks/constrained.py [--only PATTERN] [--json FILE]

Prints for each solver how many problems it solves, and what ours costs on those that both solve.

- **One function.** Everybody gets the objective and the constraints from the same ``Counter``, with
  gradients by torch. An evaluation is a point at which anything is asked for: value, constraints and
  derivatives of the same point are one. Ours differentiates for itself, and its Hessians are free, as
  are Jacobians for SciPy; trust-constr gets exact Hessians by torch, too.
- **One judge.** A problem is solved if the returned point violates no constraint by more than 1e-6,
  times the size of the constraint at the start if that is larger than 1, no bound by more than 1e-6,
  and its value differs from the lowest known one by at most 1e-6, relative to it if it is larger than
  1. So another local minimum counts as not solved, for everybody.
- **Own tolerances are tight**: 1e-8 for ours. SciPy's solvers run with their defaults and with tight
  tolerances, and are given the better of both for each problem.
- **One budget** of evaluations.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import torch
from numpy.typing import NDArray
from problems.hock_schittkowski import ConstrainedProblem, problems
from torch import Tensor

import descend

OURS, SLSQP, TRUST = "ours", "SciPy SLSQP", "SciPy trust-constr"
BUDGET = 3000
ACCURACY = 1e-6
Array = NDArray[np.float64]


class Spent(Exception):  # noqa: N818
    """No error: the budget is spent."""


class Counter:
    """A problem whose evaluations are counted.

    Attributes:
        n_eval: different points asked for, one after the other.
    """

    def __init__(self, problem: ConstrainedProblem) -> None:
        self.problem, self.n_eval = problem, 0
        self._x: bytes | None = None

    def count(self, x: Tensor) -> None:
        """Count an evaluation unless the last one was at the same point."""
        point = x.detach().numpy().tobytes()
        if point == self._x:
            return
        if self.n_eval >= BUDGET:
            raise Spent
        self._x = point
        self.n_eval += 1

    def part(self, name: str) -> Callable[[Tensor], Tensor]:
        """The objective or the constraints, counted."""
        function: Callable[[Tensor], Tensor] = getattr(self.problem, name)

        def counted(x: Tensor) -> Tensor:
            self.count(x)
            return function(x)

        return counted

    def arrays(self, name: str) -> tuple[Callable[[Array], Any], Callable[[Array], Array], Callable[..., Array]]:
        """The same for SciPy: values, first derivatives, and second ones weighted by multipliers."""
        function = self.part(name)

        def values(x: Array) -> Any:
            return function(torch.tensor(x)).numpy()

        def derivatives(x: Array) -> Array:
            array: Array = torch.autograd.functional.jacobian(function, torch.tensor(x)).numpy()  # type: ignore[no-untyped-call]
            return array

        def hessian(x: Array, weights: Array | None = None) -> Array:
            def scalar(point: Tensor) -> Tensor:
                value = function(point)
                return value if weights is None else value @ torch.tensor(weights)

            array: Array = torch.autograd.functional.hessian(scalar, torch.tensor(x)).numpy()  # type: ignore[no-untyped-call]
            return array

        return values, derivatives, hessian


class Outcome(NamedTuple):
    """What one solver did with one problem.

    Attributes:
        n_eval: evaluations until it ended.
        solved: whether the judge says so.
        claimed: whether the solver says so.
        excess: value above the lowest known one, relative.
        violation: the largest, relative.
        status: the solver's own.
    """

    n_eval: int
    solved: bool
    claimed: bool
    excess: float
    violation: float
    status: str


def judge(problem: ConstrainedProblem, x: Tensor) -> tuple[float, float]:
    """By how much a point's value exceeds the lowest known, and its largest violation."""
    excess = float(problem.fun(x) - problem.best) / max(1.0, abs(problem.best))
    equal, unequal = problem.equalities(x), problem.inequalities(x).clamp(max=0)
    sizes = [part(problem.x0).abs().clamp(min=1) for part in (problem.equalities, problem.inequalities)]
    outside = torch.cat((problem.lower - x, x - problem.upper)).clamp(min=0)
    parts = torch.cat((equal.abs() / sizes[0], unequal.abs() / sizes[1], outside))
    return excess, float(parts.max())


def ours(counter: Counter) -> tuple[Tensor, bool, str]:
    problem = counter.problem
    n_equal, n_unequal = problem.counts
    constraints = [descend.eq(counter.part("equalities"))] * (n_equal > 0)
    constraints += [descend.ineq(counter.part("inequalities"))] * (n_unequal > 0)
    bounds = (problem.lower, problem.upper) if problem.has_bounds else None
    result = descend.minimize(
        counter.part("fun"), problem.x0, bounds=bounds, constraints=constraints, tol=1e-8, max_eval=BUDGET
    )
    return result.x, result.success, result.status


def scipy_solver(counter: Counter, method: str, **options: Any) -> tuple[Tensor, bool, str]:
    problem = counter.problem
    constraints: list[Any] = []
    for name, count, low, high in zip(
        ("equalities", "inequalities"), problem.counts, (0, 0), (0, math.inf), strict=True
    ):
        if not count:
            continue
        values, derivatives, hessian = counter.arrays(name)
        if method == "SLSQP":
            kind = "ineq" if high else "eq"
            constraints.append({"type": kind, "fun": values, "jac": derivatives})
        else:
            constraints.append(scipy.optimize.NonlinearConstraint(values, low, high, jac=derivatives, hess=hessian))
    values, derivatives, hessian = counter.arrays("fun")
    result = scipy.optimize.minimize(
        lambda x: float(values(x)),
        problem.x0.numpy(),
        jac=derivatives,
        hess=hessian if method == "trust-constr" else None,
        method=method,
        bounds=scipy.optimize.Bounds(problem.lower.numpy(), problem.upper.numpy()) if problem.has_bounds else None,
        constraints=constraints,
        options=options,
    )
    return torch.tensor(result.x), bool(result.success), str(result.message)


Solver = Callable[[Counter], tuple[Tensor, bool, str]]
SOLVERS: dict[str, tuple[Solver, ...]] = {
    OURS: (ours,),
    SLSQP: (
        partial(scipy_solver, method="SLSQP"),
        partial(scipy_solver, method="SLSQP", ftol=1e-12, maxiter=1000),
    ),
    TRUST: (
        partial(scipy_solver, method="trust-constr"),
        # With gtol > 0 it ends while the barrier is still high.
        partial(scipy_solver, method="trust-constr", gtol=0, xtol=1e-10, barrier_tol=1e-10, maxiter=3000),
    ),
}


def run(solver: Solver, problem: ConstrainedProblem) -> Outcome:
    """Let one solver loose on one problem."""
    counter = Counter(problem)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            x, claimed, status = solver(counter)
    except Exception as error:  # a peer's crash is a result
        return Outcome(counter.n_eval, False, False, math.nan, math.nan, f"{type(error).__name__}: {error}")
    excess, violation = judge(problem, x)
    solved = abs(excess) <= ACCURACY and violation <= ACCURACY
    return Outcome(counter.n_eval, solved, claimed, excess, violation, status)


def better(outcomes: list[Outcome]) -> Outcome:
    """The outcome that solves the problem, with the fewest evaluations."""
    return min(outcomes, key=lambda outcome: (not outcome.solved, outcome.n_eval))


def print_table(outcomes: dict[str, dict[str, Outcome]]) -> None:
    print(f"{len(outcomes)} problems\n{'':20} solved  ratio of evaluations, ours / theirs  claimed but not solved")
    for name in SOLVERS:
        solved = [mine for mine in outcomes.values() if mine[name].solved]
        both = [mine for mine in solved if mine[OURS].solved]
        ratios = [mine[OURS].n_eval / mine[name].n_eval for mine in both]
        ratio = math.exp(sum(map(math.log, ratios)) / max(1, len(ratios)))
        false = sum(mine[name].claimed and not mine[name].solved for mine in outcomes.values())
        print(f"{name:20} {len(solved):6}  {ratio:35.2f}  {false:22}")
    for name in SOLVERS:
        print(f"not solved by {name}: {', '.join(key for key, mine in outcomes.items() if not mine[name].solved)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", default="*", help="problems whose names match, as in hs7*")
    parser.add_argument("--json", type=Path, help="file for every outcome")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    outcomes = {
        problem.name: {name: better([run(solver, problem) for solver in solvers]) for name, solvers in SOLVERS.items()}
        for problem in problems()
        if fnmatchcase(problem.name, arguments.only)
    }
    print_table(outcomes)
    if arguments.json:
        lines = {key: {name: mine._asdict() for name, mine in row.items()} for key, row in outcomes.items()}
        arguments.json.write_text(json.dumps(lines, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
