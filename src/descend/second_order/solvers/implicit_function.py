"""Derivatives of a minimizer, by the implicit function theorem.

Where the gradient g(x, theta) of a function is zero and its Hessian H regular, x is a function of theta with
dx = -H^-1 (dg/dtheta) dtheta. Variables at a bound stay there; the rest obey this formula with their part of H.

What theta is need not be known: autograd has recorded how g depends on whatever tensors ``fun`` read. x becomes the
result of an operation whose input is g. Its backward multiplies by -H^-1, and autograd goes on from g.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from descend.second_order.mathematics.definite import NotDefiniteError, cholesky, solve_by_factor, solve_by_products
from descend.second_order.problem.bounds import has_tangent
from descend.second_order.problem.objective import FunctionObjective, Point
from descend.second_order.solvers.result import Status

MAX_DENSE = 200  # variables up to which H is factorized; beyond, conjugate gradients multiply by it
MAX_PRODUCTS = 10_000
ACCURACY = 2 / 3  # residual of conjugate gradients: this power of eps
DOUBT = 1e-3  # what may be left of an error after a Newton step
NOISE = 10.0  # units in the last place


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
    nodes = _nodes(gradient)
    has_parameters = has_tangent(gradient) or any(getattr(node, "variable", leaf) is not leaf for node in nodes)
    if not has_parameters and lower is None and upper is None:
        return x.clone()
    obstacle = None
    if status is not Status.converged:
        obstacle = (
            f"the solver stopped with status {str(status)!r}, not at a minimum. Look at result.success before "
            "differentiating; result.message says what to do."
        )
    elif any(type(node).__name__.startswith("CompiledFunction") for node in nodes):
        obstacle = (
            "torch.compile's functions have no second derivatives, which autograd takes for zero. Let fun call what "
            "was compiled, not the compiled function."
        )
    solution = _Solution(who, objective, point._replace(graph=None), obstacle)
    flat: Tensor = _ImplicitFunction.apply(solution, gradient, leaf, lower, upper)  # type: ignore[no-untyped-call]
    return flat


def _nodes(tensor: Tensor) -> set[Any]:
    """The nodes of the graph of a tensor."""
    nodes: set[Any] = set()
    waiting = {tensor.grad_fn}
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            waiting |= {following for following, _ in node.next_functions}
    return nodes


class _ImplicitFunction(torch.autograd.Function):
    """(gradient, lower, upper) -> x, for a solution that has been found."""

    @staticmethod
    def forward(
        ctx: Any, solution: _Solution, gradient: Tensor, leaf: Tensor, lower: Tensor | None, upper: Tensor | None
    ) -> Tensor:
        ctx.solution = solution
        ctx.save_for_backward(gradient, leaf)
        ctx.save_for_forward(gradient, leaf)
        return solution.point.x.clone()

    @staticmethod
    def backward(ctx: Any, vector: Tensor) -> tuple[Tensor | None, ...]:
        graph = ctx.saved_tensors
        with torch.no_grad():
            parts = ctx.solution.backward(graph, vector, *ctx.needs_input_grad[3:])
        if torch.is_grad_enabled():
            parts = [None if part is None else _once(part, graph[0], vector) for part in parts]
        to_gradient, to_lower, to_upper = parts
        return None, to_gradient, None, to_lower, to_upper

    @staticmethod
    def jvp(ctx: Any, *changes: Any) -> Tensor:
        _, of_gradient, _, of_lower, of_upper = changes
        with torch.no_grad():
            change: Tensor = ctx.solution.forward(ctx.saved_tensors, of_gradient, of_lower, of_upper)
        tensors = [tensor for tensor in (of_gradient, of_lower, of_upper) if tensor is not None]
        if torch.is_grad_enabled():
            change = _once(change, ctx.saved_tensors[0], *tensors)
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


class _Solution:
    """A minimizer, the variables that bounds hold there, and the Hessian of the others.

    Args:
        who: the caller's name, for errors.
        objective: what was minimized.
        point: the minimizer.
        obstacle: why there is no derivative; None if there may be one.
    """

    def __init__(self, who: str, objective: FunctionObjective, point: Point, obstacle: str | None) -> None:
        self.who, self.objective, self.point, self.obstacle = who, objective, point, obstacle
        self.at_lower = self.at_upper = torch.zeros_like(point.x, dtype=torch.bool)
        if objective.lower is not None and objective.upper is not None:
            # Where the projection x - clamp(x - grad), which decides about convergence, meets a bound.
            self.at_lower = point.grad > point.x - objective.lower
            self.at_upper = point.grad < point.x - objective.upper
            is_fixed = objective.lower == objective.upper
            self.at_lower |= is_fixed & (point.grad >= 0)
            self.at_upper |= is_fixed & (point.grad < 0)
        self.free = ~(self.at_lower | self.at_upper)
        self.hessian: Tensor | None = None
        self.factor: Tensor | None = None  # of the free variables' part of it
        self.is_checked = False

    def backward(
        self, graph: Any, vector: Tensor, needs_lower: bool, needs_upper: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What a derivative by x is as a derivative by the gradient, and by the bounds if needed."""
        self._check(graph)
        solution = self._solve(graph, vector)
        if not (needs_lower or needs_upper):
            return -solution, None, None
        # A held variable moves with its bound, and the free ones with it.
        rest = vector - self._multiply(graph, solution)
        to_lower, to_upper = (torch.where(held, rest, 0.0) for held in (self.at_lower, self.at_upper))
        return -solution, to_lower if needs_lower else None, to_upper if needs_upper else None

    def forward(self, graph: Any, gradient: Tensor | None, lower: Tensor | None, upper: Tensor | None) -> Tensor:
        """The change of x due to changes of the gradient and of the bounds; None for none."""
        self._check(graph)
        held = torch.zeros_like(self.point.x)
        for change, mask in ((lower, self.at_lower), (upper, self.at_upper)):
            held = held if change is None else torch.where(mask, change, held)
        residual = self._multiply(graph, held) if self.has_bounds else held
        return held - self._solve(graph, residual if gradient is None else residual + gradient)

    @property
    def has_bounds(self) -> bool:
        return self.objective.lower is not None

    def _multiply(self, graph: Any, vector: Tensor) -> Tensor:
        if self.hessian is not None:
            return self.hessian @ vector
        return self.objective.product(self.point._replace(graph=graph), vector)

    def _solve(self, graph: Any, vector: Tensor) -> Tensor:
        """w with H w = vector in the free variables, and 0 in the others."""
        wanted = torch.where(self.free, vector, 0.0)
        try:
            if len(vector) > MAX_DENSE:
                return self._by_products(graph, wanted)
            if self.hessian is None or self.factor is None:
                self.hessian = self.objective.hessian(self.point._replace(graph=graph))
                self.factor = cholesky(self.hessian[self.free][:, self.free], self.objective.eps)
            return torch.zeros_like(wanted).index_put((self.free,), solve_by_factor(self.factor, wanted[self.free]))
        except NotDefiniteError as error:
            raise self._refusal(
                f"its Hessian is {error}. A minimum with positive curvature in all directions is needed: add a small "
                "quadratic term, or fix the variables that the function does not determine."
            ) from error

    def _by_products(self, graph: Any, vector: Tensor) -> Tensor:
        if not bool(torch.isfinite(vector).all()):
            return torch.full_like(vector, torch.nan)
        eps = max(self.objective.eps, torch.finfo(vector.dtype).eps)
        most = min(MAX_PRODUCTS, 10 * vector.numel())

        def multiply(direction: Tensor) -> Tensor:
            return torch.where(self.free, self._multiply(graph, direction), 0.0)

        return solve_by_products(multiply, vector, eps**ACCURACY, most)

    def _check(self, graph: Any) -> None:
        if self.is_checked:
            return
        if self.obstacle is not None:
            raise self._refusal(self.obstacle)
        if self.has_bounds:
            self._check_bounds(graph)
        self.is_checked = True

    def _check_bounds(self, graph: Any) -> None:
        """Raise an error if a Newton step, which ends as good as at the minimum, changes what the bounds hold.

        There the derivative jumps, or would be wrong on one side.
        """
        lower, upper = self.objective.lower, self.objective.upper
        assert lower is not None
        assert upper is not None
        x, grad = self.point.x, self.point.grad
        step = torch.where(self.at_lower, lower - x, torch.where(self.at_upper, upper - x, 0.0))
        step = step - self._solve(graph, grad + self._multiply(graph, step))
        change = self._multiply(graph, step)
        multiplier = (grad + change) * torch.where(self.at_upper, -1.0, 1.0)
        is_weak = multiplier <= DOUBT * change.abs()
        room = torch.minimum(x + step - lower, upper - x - step)
        is_near = room <= DOUBT * step.abs() + NOISE * self.objective.eps * x.abs()
        is_doubtful = torch.where(self.free, is_near, is_weak) & (lower < upper)
        if bool(is_doubtful.any()):
            raise self._refusal(
                f"the variable at position {int(is_doubtful.long().argmax())} of the flattened x0 is where a bound "
                "begins to hold it: there x has a kink, or the solution is not accurate enough to tell. Lower tol, or "
                "move the bound."
            )

    def _refusal(self, reason: str) -> RuntimeError:
        return RuntimeError(f"{self.who}: the solution cannot be differentiated: {reason}")
