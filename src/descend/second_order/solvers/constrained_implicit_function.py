"""Derivatives of constrained minimizers, by the implicit function theorem.

At a minimum the gradient of the Lagrangian g(x, m, theta) is zero, and so are the constraints c(x, theta) that are
active, those which hold x. They stay so while theta, x and the multipliers m change:

    H dx - A'dm = -(dg/dtheta) dtheta,        A dx = -(dc/dtheta) dtheta,

where H is the Hessian of the Lagrangian and A has the gradients of the active constraints as its rows. x becomes the
result of an operation whose inputs are g, for fixed m, and c.

Source: Fiacco 1976, Sensitivity analysis for nonlinear programming using penalty methods,
    https://doi.org/10.1007/BF01580677, theorem 2.1
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from descend.second_order.mathematics.augmented_lagrangian import largest
from descend.second_order.mathematics.definite import NotDefiniteError, solve_by_products
from descend.second_order.mathematics.kkt_system import KKTRows, ReducedHessian
from descend.second_order.problem.constrained_objective import Candidate, ConstrainedObjective
from descend.second_order.problem.objective import backward_twice, dense_hessian
from descend.second_order.solvers.implicit_function import (
    ACCURACY,
    COMPILED,
    DOUBT,
    MAX_DENSE,
    MAX_NUMBERS,
    MAX_PRODUCTS,
    NOISE,
    UNSOLVED,
    kink,
    unfinished,
    with_graph,
)
from descend.second_order.solvers.result import Status

UNCERTAIN = 0.1  # change along a Newton step, relative to what it must not exceed


def differentiable_constrained_solution(
    objective: ConstrainedObjective,
    candidate: Candidate,
    status: Status,
    lower: Tensor | None = None,
    upper: Tensor | None = None,
) -> Tensor:
    """A copy of the best point that autograd takes for a function of what f, constraints and bounds depend on.

    At most one evaluation. The copy requires no gradient if they depend on no tensor that does.

    Args:
        objective: what was minimized.
        candidate: where the solver stopped.
        status: why; unless it is ``converged``, backward raises an error.
        lower, upper: flat bounds as functions of what they were computed from, if derivatives by them are wanted.
    """
    values = objective.usable(candidate.values)
    graph = objective.conditions(values, candidate.multipliers)
    grad, _, constraints = (tensor.detach() for tensor in graph)
    solution = ConstrainedSolution(objective, values.x, grad, constraints, candidate.multipliers, status)
    return with_graph(solution, graph, lower, upper)


class ConstrainedSolution:
    """A minimizer, what holds it, and the linear system that its derivatives solve.

    Args:
        objective: for its bounds, and for the names of constraints. Everything below is scaled as it scales.
        x, grad: the minimizer, and the gradient of the Lagrangian there.
        constraints, multipliers: their values there.
        status: why the solver stopped.
    """

    is_compiled = False

    def __init__(
        self,
        objective: ConstrainedObjective,
        x: Tensor,
        grad: Tensor,
        constraints: Tensor,
        multipliers: Tensor,
        status: Status,
    ) -> None:
        functions = objective.functions
        self.who, self.name_of, self.equal, self.eps = functions.who, functions.name_of, objective.equal, objective.eps
        self.x, self.grad, self.c, self.multipliers, self.status = x, grad, constraints, multipliers, status
        self.active = self.equal | (multipliers > constraints)
        self.lower, self.upper = objective.lower, objective.upper
        self.at_lower = self.at_upper = torch.zeros_like(x, dtype=torch.bool)
        if self.lower is not None and self.upper is not None:
            # Where the projection x - clamp(x - grad), which decides about convergence, meets a bound.
            is_fixed = self.lower == self.upper
            self.at_lower = (grad > x - self.lower) | (is_fixed & (grad >= 0))
            self.at_upper = (grad < x - self.upper) | (is_fixed & (grad < 0))
        self.free = ~(self.at_lower | self.at_upper)
        self.hessian: Tensor | None = None
        self.reduced: ReducedHessian | None = None
        self.reason: str | None = None  # why there is no derivative
        self.is_checked = False

    def backward(self, graph: Any, vector: Tensor, needs_lower: bool, needs_upper: bool) -> tuple[Tensor | None, ...]:
        """What a derivative by x is as derivatives by the bounds, if needed, by the gradient, and by c."""
        self._check(graph)
        by_gradient, by_active = self._solve(graph, vector, None)
        to_lower = to_upper = None
        if needs_lower or needs_upper:
            # A held variable moves with its bound, and the others with it.
            rest = vector - self._multiply(graph, by_gradient) - self.rows.rows.T @ by_active
            to_lower = torch.where(self.at_lower, rest, 0.0) if needs_lower else None
            to_upper = torch.where(self.at_upper, rest, 0.0) if needs_upper else None
        return to_lower, to_upper, -by_gradient, -self._among_all(by_active)

    def forward(
        self, graph: Any, lower: Tensor | None, upper: Tensor | None, gradient: Tensor | None, *others: Tensor | None
    ) -> Tensor:
        """The change of x due to changes of the bounds, of the gradient and of c; None for none."""
        self._check(graph)
        zeros = torch.zeros_like(self.x)
        by_lower, by_upper, v = (zeros if change is None else change for change in (lower, upper, gradient))
        (of_constraints,) = others
        r = zeros.new_zeros(len(self.rows.rows)) if of_constraints is None else of_constraints[self.active]
        held = torch.where(self.at_lower, by_lower, torch.where(self.at_upper, by_upper, 0.0))
        v, r = v + self._multiply(graph, held), r + self.rows.rows @ held
        return held + self._solve(graph, -v, -r)[0]

    def _solve(self, graph: Any, v: Tensor, r: Tensor | None) -> tuple[Tensor, Tensor]:
        """w and u with H w + A'u = v in the free variables, A w = r, and w = 0 in the others."""

        def multiply(vector: Tensor) -> Tensor:
            return self._multiply(graph, vector)

        def solve_along(vector: Tensor) -> Tensor:
            return self._solve_by_products(graph, vector) if self.reduced is None else self.reduced.solve(vector)

        return self.rows.solve(multiply, solve_along, v, r)

    def _solve_by_products(self, graph: Any, vector: Tensor) -> Tensor:
        if not bool(torch.isfinite(vector).all()):
            return torch.full_like(vector, torch.nan)

        def project(direction: Tensor) -> Tensor:
            return self.rows.project(direction, self.free)

        def multiply(direction: Tensor) -> Tensor:
            return project(self._multiply(graph, project(direction)))

        eps = max(self.eps, torch.finfo(vector.dtype).eps)
        most = min(MAX_PRODUCTS, 10 * vector.numel())
        try:
            return project(solve_by_products(multiply, project(vector), eps**ACCURACY, most))
        except NotDefiniteError as error:
            raise RuntimeError(f"{self.who}: {UNSOLVED} {_flat(str(error))}") from error

    def _multiply(self, graph: Any, vector: Tensor) -> Tensor:
        """The Hessian of the Lagrangian times a vector."""
        if self.hessian is not None:
            return self.hessian @ vector
        gradient, leaf, _ = graph
        return self._twice(gradient, leaf, vector)

    def _twice(self, gradient: Tensor, leaf: Tensor, vector: Tensor, **options: Any) -> Tensor:
        try:
            return backward_twice(gradient, leaf, vector, **options)
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.who}: {UNSOLVED} fun or a constraint cannot be differentiated twice ({error})."
            ) from error

    def _among_all(self, by_active: Tensor) -> Tensor:
        """A vector of the active constraints as one of all constraints."""
        padded = torch.cat((by_active, by_active.new_zeros(1)))
        return padded[self.places]

    def _check(self, graph: Any) -> None:
        """Raise an error if there is no derivative."""
        if not self.is_checked:
            self.reason = self._find_reason(graph)
            self.is_checked = True
        if self.reason is not None:
            raise RuntimeError(f"{self.who}: {UNSOLVED} {self.reason}")

    def _find_reason(self, graph: Any) -> str | None:
        """Why there is no derivative; None if there is one, and what it takes has been computed."""
        if self.status is not Status.converged:
            return unfinished(self.status)
        if self.is_compiled:
            return COMPILED
        n_active = int(self.active.sum())
        if n_active * self.x.numel() > MAX_NUMBERS:
            return (
                f"{n_active} active constraints of {self.x.numel()} variables take too much memory. Let bounds hold "
                "single variables."
            )
        is_dense = self.x.numel() <= MAX_DENSE
        self.places = torch.where(self.active, self.active.long().cumsum(0) - 1, n_active)
        self.rows = KKTRows(_jacobian(graph, self.active), self.free, has_null_basis=is_dense)
        if not self.rows.are_independent(self.eps):
            return self._dependent()
        if is_dense and (reason := self._factorize(graph)) is not None:
            return reason
        return self._find_doubt(graph)

    def _factorize(self, graph: Any) -> str | None:
        """Factorize the Hessian along the constraints."""
        along = self.rows.along
        assert along is not None, "wanted where matrices are dense"
        self.hessian = self._hessian(graph[0], graph[1])
        bent = self._constraint_hessian(graph, self.multipliers)
        # The function's part and the constraints' may cancel.
        self.reduced = ReducedHessian([self.hessian + bent, -bent], along, self.eps)
        return None if self.reduced.is_definite else _flat(_defect(self.reduced))

    def _hessian(self, gradient: Tensor, leaf: Tensor) -> Tensor:
        def rows(units: Tensor) -> Tensor:
            return backward_twice(gradient, leaf, units, is_batched=True)

        return dense_hessian(self.x, rows, lambda unit: self._twice(gradient, leaf, unit))

    def _constraint_hessian(self, graph: Any, weights: Tensor) -> Tensor:
        """The Hessian of weights'c."""
        return self._hessian(_slope(graph, weights), graph[1])

    def _find_doubt(self, graph: Any) -> str | None:
        """Why the derivative is wrong, or wrong on one side, according to a Newton step from here to the minimum.

        It ends as good as at the minimum. There must be no change in what holds x, and what the derivative is computed
        from must not have changed much on the way.
        """
        held = torch.zeros_like(self.x)
        if self.lower is not None and self.upper is not None:
            to_lower, to_upper = self.lower - self.x, self.upper - self.x
            held = torch.where(self.at_lower, to_lower, torch.where(self.at_upper, to_upper, 0.0))
        v, r = self.grad + self._multiply(graph, held), self.c[self.active] + self.rows.rows @ held
        step, dual = self._solve(graph, -v, -r)
        step, rise = step + held, -self._among_all(dual)
        return (
            self._doubtful_rows(graph, step)
            or self._doubtful_curvature(graph, step, rise)
            or self._doubtful_constraints(graph, step, rise)
            or self._doubtful_bounds(graph, step, rise)
        )

    def _doubtful_rows(self, graph: Any, step: Tensor) -> str | None:
        """Whether the active constraints' gradients may be dependent at the end of the step."""
        if not len(self.rows.rows):
            return None
        weights = torch.zeros_like(self.c)
        weights[self.active] = self.rows.relation / self.rows.sizes
        change = torch.where(self.free, self._twice(_slope(graph, weights), graph[1], step), 0.0)
        is_near = self.rows.independence <= float(torch.linalg.vector_norm(change)) / UNCERTAIN
        return self._dependent() if is_near else None

    def _doubtful_curvature(self, graph: Any, step: Tensor, rise: Tensor) -> str | None:
        """Whether a curvature may vanish at the end of the step, as that of x^4 does."""
        if self.reduced is None:
            return None
        gradient, leaf, _ = graph
        try:
            with torch.enable_grad():
                change = _product(gradient, leaf, step) - _slope(graph, rise)
            hessian = self._hessian(change, leaf)
        except RuntimeError:  # an operation without third derivatives
            hessian = -self._constraint_hessian(graph, rise)
        return _flat(_defect(self.reduced)) if self.reduced.relative(hessian) >= UNCERTAIN else None

    def _doubtful_constraints(self, graph: Any, step: Tensor, rise: Tensor) -> str | None:
        """Whether an inequality may begin to hold x, or cease to."""
        change = _along(graph, step)
        rounding = NOISE * self.eps * (1.0 + largest(self.x))
        is_near = self.c + change <= DOUBT * change.abs() + rounding
        is_weak = self.multipliers + rise <= DOUBT * rise.abs() + self._noise
        is_doubtful = ~self.equal & torch.where(self.active, is_weak, is_near)
        if not bool(is_doubtful.any()):
            return None
        return (
            f"{self.name_of(int(is_doubtful.long().argmax()))} begins to hold x here: its value and its multiplier are "
            "zero, and x has a kink, or the solution is not accurate enough to tell. Lower tol, or move the constraint."
        )

    @property
    def _noise(self) -> float:
        """Rounding error of multipliers."""
        return NOISE * self.eps * (1.0 + largest(self.multipliers))

    def _doubtful_bounds(self, graph: Any, step: Tensor, rise: Tensor) -> str | None:
        """Whether a bound may begin to hold a variable, or cease to."""
        if self.lower is None or self.upper is None:
            return None
        change = self._multiply(graph, step) - self.rows.rows.T @ rise[self.active]
        multiplier = (self.grad + change) * torch.where(self.at_upper, -1.0, 1.0)
        is_weak = multiplier <= DOUBT * change.abs() + self._noise
        room = torch.minimum(self.x + step - self.lower, self.upper - self.x - step)
        is_near = room <= DOUBT * step.abs() + NOISE * self.eps * largest(self.x)
        is_doubtful = torch.where(self.free, is_near, is_weak & (self.lower < self.upper))
        return kink(int(is_doubtful.long().argmax())) if bool(is_doubtful.any()) else None

    def _dependent(self) -> str:
        weights = self.rows.relation.abs()
        places = self.active.nonzero()[:, 0][weights > UNCERTAIN * weights.amax()].tolist()
        names = " and ".join(dict.fromkeys(map(self.name_of, places[:3])))
        others = ", with others," if len(places) > 3 else ""
        return (
            f"the gradients of what holds x are linearly dependent: {names}{others} in the variables that no bound "
            "holds. Multipliers are not unique then. Leave redundant constraints out."
        )


def _jacobian(graph: Any, active: Tensor) -> Tensor:
    """The gradients of the active constraints, one a row."""
    _, leaf, constraints = graph
    places = active.nonzero()[:, 0]
    rows = torch.zeros(len(places), leaf.numel(), dtype=leaf.dtype, device=leaf.device)
    for row, place in zip(rows, places, strict=True):
        unit = torch.zeros_like(constraints)
        unit[place] = 1.0
        row += backward_twice(constraints, leaf, unit)
    return rows


def _slope(graph: Any, weights: Tensor) -> Tensor:
    """The gradient of weights'c, with its graph."""
    _, leaf, constraints = graph
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(constraints, leaf, weights, create_graph=True, allow_unused=True)
    return torch.zeros_like(leaf).detach() if slope is None else slope


def _product(gradient: Tensor, leaf: Tensor, vector: Tensor) -> Tensor:
    """The Hessian times a vector, with its graph."""
    product = None
    if gradient.requires_grad:
        (product,) = torch.autograd.grad(gradient, leaf, vector, create_graph=True, allow_unused=True)
    return torch.zeros_like(vector) if product is None else product


def _along(graph: Any, step: Tensor) -> Tensor:
    """The derivative of c along a step: that of weights'A step by the weights."""
    with torch.enable_grad():
        weights = torch.zeros_like(graph[2]).detach().requires_grad_()
        slope = _slope(graph, weights)
        if not slope.requires_grad:
            return torch.zeros_like(weights).detach()
        (change,) = torch.autograd.grad(slope, weights, step, allow_unused=True)
    return torch.zeros_like(weights).detach() if change is None else change


def _flat(what: str) -> str:
    return (
        f"the Hessian of the Lagrangian, along what holds x, is {what}. A minimum with positive curvature in all "
        "directions that the constraints leave is needed: add a small quadratic term to fun, or fix the variables that "
        "the problem does not determine."
    )


def _defect(hessian: ReducedHessian) -> str:
    if not hessian.is_finite:
        return "NaN or infinite"
    return f"singular or not positive definite (least eigenvalue {hessian.least:.2g})"
