"""Who minimizes, and what it costs: evaluations counted outside of the solvers, one rule for all.

- **One function.** Everybody gets values and gradients from the same ``Counter``, in the dtype of the
  problem, whatever numbers they calculate with themselves. A call is an evaluation, a product with
  the Hessian another; solvers that ask for the value alone get no discount.
- **One finish.** A run is solved at the first evaluated point within bounds where no entry of the
  (projected) gradient exceeds ``tol`` times the largest at the start, or times 1 if that is smaller.
  The counter sees it and stops the run there, so nobody is judged by a stopping rule of his own.
- **One budget** of evaluations and products together.
- **Own tolerances are off** where there are any (0 in SciPy, torch and pytorch-minimize); one entry
  has torch's defaults. A solver that ends by itself before the finish has stopped early, and if it
  says that it converged, that was a false success.
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
from problems import Problem
from torch import Tensor

import descend

OURS = "ours"
HISTORY = 10
ENDLESS = 1_000_000
Array = NDArray[np.float64]


class Finish(Exception):  # noqa: N818
    """No error: the run is over, as the target is met or the budget is spent."""


class Counter:
    """A problem whose evaluations are counted, and ended at the finish.

    Attributes:
        n_eval, n_hvp: evaluations of value and gradient, products with the Hessian.
        solved: whether a point met the target.
        outside: whether a point was out of bounds.
    """

    def __init__(self, problem: Problem, tol: float, budget: int) -> None:
        self.problem, self.budget = problem, budget
        self.n_eval = self.n_hvp = 0
        self.solved = self.outside = False
        self.target = tol * max(1.0, self.norm(problem.x0, self.value_and_grad(problem.x0)[1]))
        self.curvature: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def cost(self) -> int:
        return self.n_eval + self.n_hvp

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            value = self.problem.fun(leaf)
            return value.detach(), torch.autograd.grad(value, leaf)[0]

    def norm(self, x: Tensor, grad: Tensor) -> float:
        """The largest entry of the gradient, or of the step to where its negative leads within bounds."""
        if self.problem.lower is not None:
            grad = x - (x - grad).clamp(self.problem.lower, self.problem.upper)
        return grad.abs().max().item()

    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Value and gradient, counted."""
        if self.cost >= self.budget:
            raise Finish
        self.n_eval += 1
        x = x.detach().to(self.problem.x0.dtype)
        if self.problem.lower is not None and self.problem.upper is not None:
            self.outside |= bool(((x < self.problem.lower) | (x > self.problem.upper)).any())
        value, grad = self.value_and_grad(x)
        if value.isfinite() and self.norm(x, grad) <= self.target:
            self.solved = True
            raise Finish
        return value, grad

    def product(self, x: Tensor, direction: Tensor) -> Tensor:
        """The Hessian at x times a direction, counted. Several in a row share the gradient's graph."""
        if self.cost >= self.budget:
            raise Finish
        self.n_hvp += 1
        if self.curvature is None or not torch.equal(self.curvature[0], x):
            with torch.enable_grad():
                leaf = x.detach().clone().requires_grad_()
                grad = torch.autograd.grad(self.problem.fun(leaf), leaf, create_graph=True)[0]
            self.curvature = x.detach().clone(), leaf, grad
        _, leaf, grad = self.curvature
        return torch.autograd.grad(grad, leaf, direction, retain_graph=True)[0]

    def arrays(self, x: Array) -> tuple[float, Array]:
        """``evaluate`` for SciPy."""
        value, grad = self.evaluate(torch.tensor(x))
        return value.item(), grad.double().numpy()

    def product_array(self, x: Array, direction: Array) -> Array:
        """``product`` for SciPy."""
        dtype = self.problem.x0.dtype
        array: Array = self.product(torch.tensor(x, dtype=dtype), torch.tensor(direction, dtype=dtype)).double().numpy()
        return array


class Known(torch.autograd.Function):
    """A counted evaluation for a solver that calls ``backward``: the gradient is known already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counter: Counter) -> Tensor:
        value, ctx.grad = counter.evaluate(x)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.grad, None


class Ending(NamedTuple):
    """How a solver ended by itself: where it is, its value there, whether it says that this is a minimum."""

    x: Tensor
    value: float
    success: bool


Solver = Callable[[Counter], Ending]


def ours(counter: Counter, tol: float, **options: Any) -> Ending:
    problem = counter.problem
    bounds = None if problem.lower is None else (problem.lower, problem.upper)
    # jac=True: the counter knows the gradient; every call of it is one evaluation.
    result = descend.minimize(counter.evaluate, problem.x0, bounds=bounds, tol=tol, jac=True, **options)
    return Ending(result.x, result.fun, result.success)


def scipy_solver(counter: Counter, method: str, **options: Any) -> Ending:
    problem = counter.problem
    if problem.lower is not None and problem.upper is not None:
        options["bounds"] = scipy.optimize.Bounds(problem.lower.double().numpy(), problem.upper.double().numpy())
    result = scipy.optimize.minimize(counter.arrays, problem.x0.double().numpy(), jac=True, method=method, **options)
    return Ending(torch.tensor(result.x), float(result.fun), bool(result.success))


def torch_lbfgs(counter: Counter, **tolerances: float) -> Ending:
    param = counter.problem.x0.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [param],
        max_iter=ENDLESS,
        max_eval=ENDLESS,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
        **tolerances,
    )

    def closure() -> float:
        value, param.grad = counter.evaluate(param)
        return value.item()

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    # Torch never says that it converged.
    return Ending(param.detach(), counter.value_and_grad(param)[0].item(), success=False)


def torchmin_solver(counter: Counter) -> Ending:
    import torchmin  # an optional peer

    problem = counter.problem

    def fun(x: Tensor) -> Tensor:
        value: Tensor = Known.apply(x, counter)  # type: ignore[no-untyped-call]
        return value

    if problem.lower is None:
        options = dict(history_size=HISTORY, gtol=0, xtol=0, gtd_tol=0)
        result = torchmin.minimize(fun, problem.x0, method="l-bfgs", max_iter=ENDLESS, options=options)
    else:
        options = dict(history_size=HISTORY, gtol=0, ftol=0)
        bounds = problem.lower, problem.upper
        result = torchmin.minimize_constr(
            fun, problem.x0, method="l-bfgs-b", bounds=bounds, max_iter=ENDLESS, options=options
        )
    return Ending(result.x, float(result.fun), bool(result.success))


def scipy_first(method: str, **options: Any) -> Solver:
    return partial(scipy_solver, method=method, options=dict(maxiter=ENDLESS, gtol=0, **options))


def scipy_second(method: str, **options: Any) -> Solver:
    def solve(counter: Counter) -> Ending:
        return scipy_solver(
            counter, method, hessp=counter.product_array, options=dict(maxiter=ENDLESS, disp=False, **options)
        )

    return solve


def our_newton(counter: Counter, tol: float) -> Ending:
    return ours(counter, tol, method="newton-cg", hvp=counter.product)


LBFGSB = "SciPy L-BFGS-B"
NEWTON_CG = "SciPy Newton-CG"
BFGS = "SciPy BFGS"
TRUST_NCG = "SciPy trust-ncg"
TORCH = "torch LBFGS"
TORCH_DEFAULTS = "torch LBFGS as is"
TORCHMIN = "torchmin L-BFGS"
TORCHMIN_B = "torchmin L-BFGS-B"
PEERS: dict[str, Solver] = {
    LBFGSB: scipy_first("L-BFGS-B", maxcor=HISTORY, ftol=0, maxfun=ENDLESS),
    BFGS: scipy_first("BFGS"),
    TORCH: partial(torch_lbfgs, tolerance_grad=0, tolerance_change=0),
    TORCH_DEFAULTS: torch_lbfgs,
    TORCHMIN: torchmin_solver,
    TORCHMIN_B: torchmin_solver,
    NEWTON_CG: scipy_second("Newton-CG", xtol=0),
    TRUST_NCG: scipy_second("trust-ncg", gtol=0),
}
# Most variables, where a run would take minutes: SciPy's BFGS has dense matrices, pytorch-minimize's
# L-BFGS-B a Python loop over the variables.
LARGEST = {BFGS: 300, TORCHMIN_B: 100}


class Outcome(NamedTuple):
    """What one solver did with one problem.

    Attributes:
        cost: evaluations and products until the end.
        solved: it reached the finish.
        early: it ended by itself before; or it raised an error, which counts as that.
        false_success: and it said that it converged.
        nan: and its result or its value is NaN.
        outside: it evaluated, or returned, a point out of bounds.
        error: what it raised, else empty.
    """

    cost: int
    solved: bool
    early: bool = False
    false_success: bool = False
    nan: bool = False
    outside: bool = False
    error: str = ""


Outcomes = dict[str, dict[str, Outcome]]
"""Problem name -> solver -> what it did."""


def run(solver: Solver, problem: Problem, tol: float, budget: int) -> Outcome:
    """Let one solver loose on one problem."""
    counter = Counter(problem, tol, budget)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            ending = solver(counter)
    except Finish:
        return Outcome(counter.cost, counter.solved, outside=counter.outside)
    except Exception as error:  # a peer's crash is a result
        return Outcome(
            counter.cost, False, early=True, outside=counter.outside, error=f"{type(error).__name__}: {error}"
        )
    nan = bool(ending.x.isnan().any()) or ending.value != ending.value
    outside = counter.outside
    if problem.lower is not None and problem.upper is not None:
        outside |= bool(((ending.x < problem.lower) | (ending.x > problem.upper)).any())
    return Outcome(counter.cost, False, True, ending.success, nan, outside)


def begins_solved(problem: Problem, tol: float) -> bool:
    """Whether the start already meets the target: nothing to measure."""
    counter = Counter(problem, tol, budget=1)
    return counter.norm(problem.x0, counter.value_and_grad(problem.x0)[1]) <= counter.target
