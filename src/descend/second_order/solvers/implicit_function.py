"""Derivatives of minimizers, by the implicit function theorem.

Where the gradient g(x, theta) of a function is zero and its Hessian H regular, x is a function of theta with
dx = -H^-1 (dg/dtheta) dtheta. Variables at a bound stay there; the rest obey this formula with their part of H.

What theta is need not be known: autograd has recorded how g depends on whatever tensors ``fun`` read. x becomes the
result of an operation whose input is g. Its backward multiplies by -H^-1, and autograd goes on from g. Other conditions
that hold at x, such as active constraints, are further inputs.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from descend.second_order.mathematics.definite import NotDefiniteError, cholesky, solve_by_factor, solve_by_products
from descend.second_order.problem.bounds import has_tangent
from descend.second_order.problem.graphs import is_compiled, nodes_of
from descend.second_order.problem.objective import FunctionObjective, Point
from descend.second_order.solvers.result import Status

MAX_DENSE = 200  # variables of a problem up to which H is factorized; beyond, conjugate gradients multiply by it
MAX_NUMBERS = 2**26  # numbers in all dense H
MAX_PRODUCTS = 10_000
ACCURACY = 2 / 3  # residual of conjugate gradients: this power of eps
DOUBT = 1e-3  # what may be left of an error after a Newton step
NOISE = 10.0  # units in the last place


class Curvature(Protocol):
    """Second derivatives at some solutions. ``graph``: the gradient with its graph, and the variables in it."""

    def product(self, graph: Any, vector: Tensor) -> Tensor:
        """The Hessians times a vector each; (B, n)."""

    def hessians(self, graph: Any) -> Tensor:
        """The Hessians, (B, n, n)."""


class Implicit(Protocol):
    """Solutions x of equations, and their derivatives.

    ``graph``: with their graphs, the gradient, the variables in it, and what else the equations set to zero.

    Attributes:
        x: the solutions, in the number of entries of the gradient.
        is_compiled: whether the graph comes from a compiled function; set from outside.
    """

    x: Tensor
    is_compiled: bool

    def backward(self, graph: Any, vector: Tensor, needs_lower: bool, needs_upper: bool) -> tuple[Tensor | None, ...]:
        """What a derivative by x is as derivatives by the bounds, if needed, by the gradient, and by what else."""

    def forward(
        self, graph: Any, lower: Tensor | None, upper: Tensor | None, gradient: Tensor | None, *others: Tensor | None
    ) -> Tensor:
        """The change of x due to changes of the same; None for none."""


class _OneProblem:
    """The curvature of an objective at a point."""

    def __init__(self, objective: FunctionObjective, point: Point) -> None:
        self.objective, self.point = objective, point

    def product(self, graph: Any, vector: Tensor) -> Tensor:
        return self.objective.product(self.point._replace(graph=graph), vector[0])[None]

    def hessians(self, graph: Any) -> Tensor:
        return self.objective.hessian(self.point._replace(graph=graph))[None]


def differentiable_solution(
    who: str,
    objective: FunctionObjective,
    x: Tensor,
    status: Status,
    lower: Tensor | None = None,
    upper: Tensor | None = None,
) -> Tensor:
    """A copy of ``x`` that autograd takes for a function of what the objective's gradient depends on.

    One evaluation. The copy requires no gradient if the objective's depends on no tensor that does.

    Args:
        who: the caller's name, for errors.
        objective: what was minimized.
        x: where the solver stopped.
        status: why; unless it is ``converged``, backward raises an error.
        lower, upper: flat bounds as functions of what they were computed from, if derivatives by them are wanted.
    """
    objective.keeps_graph = True
    point = objective.evaluate(x)
    gradient, leaf = point.graph
    curvature = _OneProblem(objective, point._replace(graph=None))
    bounds = None
    if objective.lower is not None and objective.upper is not None:
        bounds = objective.lower[None], objective.upper[None]
    solution = Solution(who, curvature, x[None], point.grad[None], bounds, [status], objective.eps)
    return with_graph(solution, (gradient, leaf), lower, upper)


def with_graph(
    solution: Implicit, graph: tuple[Tensor, ...], lower: Tensor | None = None, upper: Tensor | None = None
) -> Tensor:
    """A copy of a solution, in the shape of the gradient, as a function of what that and the bounds depend on.

    Args:
        solution: the solution.
        graph: with their graphs, the gradient, the variables in it, and what else is zero.
        lower, upper: bounds with their graphs, in the same shape; None for those without.
    """
    gradient, leaf, *others = graph
    nodes = set().union(*(nodes_of(tensor) for tensor in (gradient, *others)))
    has_parameters = any(has_tangent(tensor) for tensor in (gradient, *others)) or any(
        getattr(node, "variable", leaf) is not leaf for node in nodes
    )
    if not has_parameters and lower is None and upper is None:
        return solution.x.reshape(gradient.shape).clone()
    solution.is_compiled = is_compiled(nodes)
    x: Tensor = _ImplicitFunction.apply(solution, lower, upper, *graph)  # type: ignore[no-untyped-call]
    return x


class _ImplicitFunction(torch.autograd.Function):
    """(lower, upper, gradient, variables, what else is zero) -> x, for solutions that have been found."""

    @staticmethod
    def forward(
        ctx: Any, solution: Implicit, lower: Tensor | None, upper: Tensor | None, gradient: Tensor, *others: Tensor
    ) -> Tensor:
        ctx.solution = solution
        ctx.save_for_backward(gradient, *others)
        ctx.save_for_forward(gradient, *others)
        return solution.x.reshape(gradient.shape).clone()

    @staticmethod
    def backward(ctx: Any, vector: Tensor) -> tuple[Tensor | None, ...]:
        graph = ctx.saved_tensors
        with torch.no_grad():
            parts = ctx.solution.backward(graph, vector, *ctx.needs_input_grad[1:3])
        if torch.is_grad_enabled():
            parts = [None if part is None else _once(part, *graph, vector) for part in parts]
        to_lower, to_upper, to_gradient, *to_others = parts
        return None, to_lower, to_upper, to_gradient, None, *to_others

    @staticmethod
    def jvp(ctx: Any, *changes: Any) -> Tensor:
        _, of_lower, of_upper, of_gradient, _, *of_others = changes
        known = of_lower, of_upper, of_gradient, *of_others
        with torch.no_grad():
            change: Tensor = ctx.solution.forward(ctx.saved_tensors, *known)
        tensors = [tensor for tensor in known if tensor is not None]
        if torch.is_grad_enabled():
            change = _once(change, *ctx.saved_tensors, *tensors)
        return change


def _once(derivative: Tensor, *depends_on: Tensor) -> Tensor:
    """A first derivative, which cannot be differentiated again."""
    result: Tensor = _Once.apply(derivative, *depends_on)  # type: ignore[no-untyped-call]
    return result


class _Once(torch.autograd.Function):
    """Its backward is an error; ``depends_on`` leads every attempt there."""

    @staticmethod
    def forward(ctx: Any, derivative: Tensor, *depends_on: Tensor) -> Tensor:
        return derivative.clone()

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor) -> Any:
        raise RuntimeError(
            "The derivative of a solution cannot be differentiated again: only first derivatives of minimizers are "
            "supported. Take differences of first ones."
        )


class Solution:
    """Minimizers of B problems, the variables that bounds hold there, and the Hessians of the others.

    Args:
        who: the caller's name, for errors.
        curvature: at the minimizers.
        x, grad: the minimizers and the gradients there, (B, n).
        bounds: lower and upper, (B, n).
        statuses: why the solver stopped.
        eps: relative rounding error of the function.
    Attributes:
        is_compiled: whether the gradient comes from a compiled function.
    """

    is_compiled = False

    def __init__(
        self,
        who: str,
        curvature: Curvature,
        x: Tensor,
        grad: Tensor,
        bounds: tuple[Tensor, Tensor] | None,
        statuses: list[Status],
        eps: float,
    ) -> None:
        self.who, self.curvature, self.x, self.grad, self.bounds, self.eps = who, curvature, x, grad, bounds, eps
        self.statuses = statuses
        self.at_lower = self.at_upper = torch.zeros_like(x, dtype=torch.bool)
        if bounds is not None:
            lower, upper = bounds
            # Where the projection x - clamp(x - grad), which decides about convergence, meets a bound.
            self.at_lower = (grad > x - lower) | ((lower == upper) & (grad >= 0))
            self.at_upper = (grad < x - upper) | ((lower == upper) & (grad < 0))
        self.free = ~(self.at_lower | self.at_upper)
        self.hessians: Tensor | None = None
        self.factors: Tensor | None = None  # of the free variables' parts
        self.reasons: dict[int, str] = {}  # why problems have no derivative
        self.is_checked = False

    def backward(
        self, graph: Any, vector: Tensor, needs_lower: bool, needs_upper: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """What a derivative by x is as derivatives by the bounds, if needed, and by the gradient."""
        wanted = vector.reshape(self.x.shape)
        self._check(graph, wanted)
        solution = self._solve(graph, wanted)
        to_lower = to_upper = None
        if needs_lower or needs_upper:
            # A held variable moves with its bound, and the free ones with it.
            rest = wanted - self._multiply(graph, solution)
            to_lower = torch.where(self.at_lower, rest, 0.0).reshape(vector.shape) if needs_lower else None
            to_upper = torch.where(self.at_upper, rest, 0.0).reshape(vector.shape) if needs_upper else None
        return to_lower, to_upper, -solution.reshape(vector.shape)

    def forward(
        self, graph: Any, lower: Tensor | None, upper: Tensor | None, gradient: Tensor | None, *others: Tensor | None
    ) -> Tensor:
        """The change of x due to changes of the bounds and of the gradient; None for none."""
        self._check(graph, torch.ones_like(self.x))
        zeros = torch.zeros_like(self.x)
        residual, by_lower, by_upper = (
            zeros if change is None else change.reshape(self.x.shape) for change in (gradient, lower, upper)
        )
        held = torch.where(self.at_lower, by_lower, torch.where(self.at_upper, by_upper, 0.0))
        if self.bounds is not None:
            residual = residual + self._multiply(graph, held)
        return (held - self._solve(graph, residual)).reshape(graph[0].shape)

    def _multiply(self, graph: Any, vector: Tensor) -> Tensor:
        if self.hessians is not None:
            return (self.hessians @ vector[..., None])[..., 0]
        return self.curvature.product(graph, vector)

    def _solve(self, graph: Any, vector: Tensor) -> Tensor:
        """w with H w = vector in the free variables, and 0 in the others."""
        wanted = torch.where(self.free, vector, 0.0)
        if self.factors is not None:
            return solve_by_factor(self.factors, wanted)
        if not bool(torch.isfinite(wanted).all()):
            return torch.full_like(vector, torch.nan)

        def multiply(direction: Tensor) -> Tensor:
            product = self._multiply(graph, direction.view(self.x.shape))
            return torch.where(self.free, product, 0.0).reshape(-1)

        eps = max(self.eps, torch.finfo(vector.dtype).eps)
        most = min(MAX_PRODUCTS, 10 * vector.numel())
        try:
            return solve_by_products(multiply, wanted.reshape(-1), eps**ACCURACY, most).view(self.x.shape)
        except NotDefiniteError as error:
            raise RuntimeError(f"{self.who}: {UNSOLVED} {_flat_minimum(str(error))}") from error

    def _check(self, graph: Any, asked: Tensor) -> None:
        """Raise an error if a problem has no derivative whose row of ``asked`` is not zero."""
        if not self.is_checked:
            self._find_reasons(graph)
            self.is_checked = True
        if self.reasons:
            failed = sorted(self.reasons)
            is_asked = (asked[failed] != 0).any(1)
            if bool(is_asked.any()):
                first = failed[int(is_asked.long().argmax())]
                which = f"problem {first}: " if len(self.x) > 1 else ""
                raise RuntimeError(f"{self.who}: {UNSOLVED} {which}{self.reasons[first]}")

    def _find_reasons(self, graph: Any) -> None:
        self._leave_out(
            {i: unfinished(status) for i, status in enumerate(self.statuses) if status is not Status.converged}
        )
        if self.is_compiled:
            self._leave_out(dict.fromkeys(range(len(self.x)), COMPILED))
        if len(self.reasons) == len(self.x):
            return
        if self.x.shape[1] <= MAX_DENSE and self.x.shape[1] * self.x.numel() <= MAX_NUMBERS:
            self._factorize(graph)
        if self.bounds is not None:
            self._leave_out(self._kinks(graph, *self.bounds))

    def _leave_out(self, reasons: dict[int, str]) -> None:
        """Take some problems out of all computations."""
        self.reasons = reasons | self.reasons
        rows = list(reasons)
        for mask in (self.free, self.at_lower, self.at_upper):
            mask[rows] = False

    def _factorize(self, graph: Any) -> None:
        """Factorize the free variables' parts of the Hessians."""
        self.hessians = self.curvature.hessians(graph)
        is_free = self.free[:, :, None] & self.free[:, None, :]
        identity = torch.eye(self.x.shape[1], dtype=self.x.dtype, device=self.x.device)
        parts = torch.where(is_free, self.hessians, identity)
        self.factors, is_definite = cholesky(parts, self.eps)
        self._leave_out({i: _flat_minimum(_defect(parts[i])) for i in (~is_definite).nonzero()[:, 0].tolist()})

    def _kinks(self, graph: Any, lower: Tensor, upper: Tensor) -> dict[int, str]:
        """The problems in which a Newton step, which ends as good as at the minimum, changes what the bounds hold.

        There the derivative jumps, or would be wrong on one side.
        """
        x, grad = self.x, self.grad
        is_held = self.at_lower | self.at_upper
        step = torch.where(self.at_lower, lower - x, torch.where(self.at_upper, upper - x, 0.0))
        step = step - self._solve(graph, grad + self._multiply(graph, step))
        change = self._multiply(graph, step)
        multiplier = (grad + change) * torch.where(self.at_upper, -1.0, 1.0)
        is_weak = multiplier <= DOUBT * change.abs()
        room = torch.minimum(x + step - lower, upper - x - step)
        is_near = room <= DOUBT * step.abs() + NOISE * self.eps * x.abs()
        is_doubtful = (self.free & is_near) | (is_held & is_weak & (lower < upper))
        places = is_doubtful.long().argmax(1).tolist()
        return {i: kink(places[i]) for i in is_doubtful.any(1).nonzero()[:, 0].tolist()}


UNSOLVED = "the solution cannot be differentiated:"
COMPILED = (
    "torch.compile's functions have no second derivatives, which autograd takes for zero. Let fun call what was "
    "compiled, not the compiled function."
)


def unfinished(status: Status) -> str:
    """Why a solution with another status than ``converged`` has no derivative."""
    return (
        f"the solver stopped with status {str(status)!r}, not at a minimum. Look at result.success before "
        "differentiating; result.message says what to do."
    )


def kink(place: int) -> str:
    """Why there is no derivative where a bound begins to hold a variable."""
    return (
        f"the variable at position {place} of the flattened x0 is where a bound begins to hold it: there x has a kink, "
        "or the solution is not accurate enough to tell. Lower tol, or move the bound."
    )


def _defect(hessian: Tensor) -> str:
    if not bool(hessian.isfinite().all()):
        return "NaN or infinite"
    return f"singular or not positive definite (least eigenvalue {float(torch.linalg.eigvalsh(hessian)[0]):.2g})"


def _flat_minimum(what: str) -> str:
    return (
        f"its Hessian is {what}. A minimum with positive curvature in all directions is needed: add a small quadratic "
        "term, or fix the variables that the function does not determine."
    )
