"""The augmented Lagrangian of a function with constraints, as an objective."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from descend.second_order.mathematics.augmented_lagrangian import (
    largest,
    penalty_term,
    updated_multipliers,
    violations,
)
from descend.second_order.mathematics.space import Space
from descend.second_order.problem.constrained_functions import ConstrainedFunctions, Values
from descend.second_order.problem.objective import BATCH, Curved, Point, check_dense_fits

MOST_NUMBERS = 300  # variables and constraints together, for dense matrices
MOST_ROWS = 100  # constraints of which each is scaled by its own gradient
INSTEAD = "minimize(method='l-bfgs')"


class Candidate(NamedTuple):
    """A point, with the multipliers for which its gradient is that of the Lagrangian."""

    point: Point
    multipliers: Tensor

    @property
    def values(self) -> Values:
        values: Values = self.point.graph
        return values


class ConstrainedObjective(Curved):
    """f plus penalties, for multipliers and a penalty that the solver sets.

    Everything here is scaled: f by ``fun_scale``, and each constraint by an entry of ``scales``. The ``graph`` of a
    point is its ``Values``, which are not scaled.

    Args:
        functions: f and the constraints.
        bounds: flat lower and upper bounds.
    Attributes:
        feasible: violation up to which a point is feasible; set by the solver.
        equal: which entries of the constraints are equalities.
        best: the lowest feasible point evaluated, or the least infeasible one if none is feasible.
        fun_weight: 1, or 0 to minimize the violation alone.
    """

    def __init__(self, functions: ConstrainedFunctions, bounds: tuple[Tensor, Tensor] | None) -> None:
        structure = functions.structure
        super().__init__(Space(structure.numel), structure.eps, *(bounds or ()))
        self.functions = functions
        self.feasible, self.fun_scale, self.fun_weight, self.penalty = 0.0, 1.0, 1.0, 1.0
        self.scales = torch.zeros(0, dtype=structure.dtype, device=structure.device)
        self.multipliers, self.equal = self.scales, self.scales.bool()
        self.best: Candidate | None = None
        self._known: Values | None = None
        self._slope: tuple[Values, list[Tensor | None]] | None = None

    @property
    def is_small(self) -> bool:
        """Whether dense matrices cost little."""
        return self.space.numel + len(self.scales) <= MOST_NUMBERS

    def evaluate(self, x: Tensor, direction: Tensor | None = None, origin: Point | None = None) -> Point:
        if self.is_known(x):
            self.n_eval -= 1  # nothing is called
        point = super().evaluate(x, direction, origin)
        if point.graph is None:
            undefined = torch.tensor(math.nan)
            return point._replace(graph=Values(x, (), undefined, torch.full_like(self.scales, math.nan)))
        if point.is_finite and self.fun_weight:
            self._compare(Candidate(point, self.first_order_multipliers(point.graph)))
        return point

    def value_and_grad(self, x: Tensor) -> tuple[Tensor | float, Tensor, Any]:
        values = self._known if self.is_known(x) and self._known is not None else self._call(x)
        if not (math.isfinite(values.value) and math.isfinite(values.violation)):
            return math.nan, torch.full_like(x, math.nan), values
        return (
            self._augmented(values.fun.detach(), values.constraints.detach()),
            self.lagrangian_gradient(values, self.first_order_multipliers(values)),
            values,
        )

    def _call(self, x: Tensor) -> Values:
        values = self.functions.call(x)
        if not len(self.scales):
            self._begin()
        c = self.scaled(values)
        values.violation = largest(violations(c, self.equal)) if bool(c.isfinite().all()) else math.nan
        return values

    def _begin(self) -> None:
        pairs = zip(self.functions.constraints, self.functions.shapes, strict=True)
        kinds = [one.is_equality for one, shape in pairs for _ in range(shape.numel())]
        self.equal = torch.tensor(kinds, dtype=torch.bool, device=self.scales.device)
        self.scales = self.scales.new_ones(len(kinds))
        self.multipliers = torch.zeros_like(self.scales)
        self.functions.keeps_graphs = self.functions.keeps_graphs and self.is_small

    def _augmented(self, fun: Tensor, constraints: Tensor) -> Tensor:
        """The augmented Lagrangian."""
        term = penalty_term(self.scales * constraints, self.multipliers, self.penalty, self.equal)
        return self.fun_weight * self.fun_scale * fun + term

    def _compare(self, candidate: Candidate) -> None:
        if self.best is None or self._rank(candidate.values) < self._rank(self.best.values):
            self.best = candidate

    def _rank(self, values: Values) -> tuple[bool, float]:
        """Sorts points: feasible ones by their value, then the others by their violation."""
        is_infeasible = not values.violation <= self.feasible
        return is_infeasible, values.violation if is_infeasible else values.value

    def is_known(self, x: Tensor) -> bool:
        """Whether ``x`` is the point of ``remember``, and can be evaluated without calling anything."""
        return self._known is not None and self._known.x is x and self.functions.is_usable(self._known)

    def remember(self, values: Values) -> None:
        """Keep the values at a point that will be evaluated next, with other multipliers."""
        self._known = values

    def usable(self, values: Values) -> Values:
        """The values with a graph; they are computed again if it is gone."""
        if self.functions.is_usable(values):
            return values
        self.n_eval += 1
        return self._call(values.x)

    def set_scales(self, values: Values) -> None:
        """Scale f and the constraints to gradients whose entries are at most 1 at a point."""
        self.fun_scale = 1 / max(1.0, largest(self.functions.gradient(values, 1.0)))
        self.scales = 1 / self._row_sizes(values).nan_to_num(nan=1.0, posinf=1.0).clamp(min=1.0)
        values.violation = largest(violations(self.scaled(values), self.equal))
        self.best = None  # it was ranked by other scales

    def _row_sizes(self, values: Values) -> Tensor:
        """Largest entry in each row of the Jacobian; an estimate for each constraint if there are many rows."""
        if not len(self.scales):
            return self.scales
        if len(self.scales) <= MOST_ROWS and len(self.scales) * self.space.numel <= BATCH:
            return self.functions.jacobian(values).abs().amax(1)
        sizes, start = torch.ones_like(self.scales), 0
        for shape in self.functions.shapes:
            part = slice(start, start := start + shape.numel())
            signs = torch.zeros_like(self.scales)
            signs[part] = 1.0
            signs[part][1::2] = -1.0
            sizes[part] = largest(self.functions.gradient(values, 0.0, signs))
        return sizes

    def set_multipliers(self, multipliers: Tensor, penalty: float, fun_weight: float = 1.0) -> None:
        self.multipliers, self.penalty, self.fun_weight = multipliers, penalty, fun_weight
        self._slope = None

    def scaled(self, values: Values) -> Tensor:
        """The constraints, scaled."""
        return self.scales * values.constraints.detach()

    def first_order_multipliers(self, values: Values) -> Tensor:
        return updated_multipliers(self.scaled(values), self.multipliers, self.penalty, self.equal)

    def lagrangian_gradient(self, values: Values, multipliers: Tensor) -> Tensor:
        """The gradient of f - multipliers'c; f counts as often as ``fun_weight`` says."""
        return self.functions.gradient(values, self.fun_weight * self.fun_scale, -multipliers * self.scales)

    def function_gradient(self, values: Values) -> Tensor:
        return self.functions.gradient(values, self.fun_scale)

    def jacobian(self, values: Values) -> Tensor:
        return self.scales[:, None] * self.functions.jacobian(values)

    def lagrangian_hessian(self, values: Values, multipliers: Tensor) -> Tensor:
        """The Hessian of f - multipliers'c; counts as one product per variable."""
        self.n_hvp += self.space.numel
        weights = multipliers * self.scales
        slope = self.functions.slope(values, lambda fun, constraints: self.fun_scale * fun - weights @ constraints)
        return self.functions.hessian(values, slope)

    def conditions(self, values: Values, multipliers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With their graphs, the gradient of f - multipliers'c for fixed multipliers, the variables in it, and c."""
        (leaf,) = values.leaves
        weights = (multipliers * self.scales).detach()
        with torch.enable_grad():
            constraints = self.scales * values.constraints
            lagrangian = self.fun_scale * values.fun - weights @ values.constraints
            grad = None
            if lagrangian.requires_grad:
                (grad,) = torch.autograd.grad(lagrangian, leaf, create_graph=True, allow_unused=True)
        return torch.zeros_like(values.x) if grad is None else grad, leaf, constraints

    def projected(self, x: Tensor, grad: Tensor) -> Tensor:
        """The gradient, projected on the bounds: x - clamp(x - grad)."""
        if self.lower is None or self.upper is None:
            return grad
        return torch.clamp(grad, x - self.upper, x - self.lower)

    def product(self, point: Point, vector: Tensor) -> Tensor:
        self.n_hvp += 1
        try:
            return self.functions.product(*self._slope_at(point), vector)
        except RuntimeError as error:
            raise self._not_twice(error) from error

    def hessian(self, point: Point) -> Tensor:
        check_dense_fits(self.functions.who, point.x, INSTEAD, self.space)
        self.n_hvp += self.space.numel
        try:
            return self.functions.hessian(*self._slope_at(point))
        except RuntimeError as error:
            raise self._not_twice(error) from error

    def _slope_at(self, point: Point) -> tuple[Values, list[Tensor | None]]:
        """The gradient of the augmented Lagrangian at a point, with a graph."""
        values = self.usable(point.graph)
        if self._slope is None or self._slope[0] is not values:
            self._slope = values, self.functions.slope(values, self._augmented)
        return self._slope

    def _not_twice(self, error: RuntimeError) -> RuntimeError:
        return RuntimeError(
            f"{self.functions.who}: fun or a constraint cannot be differentiated twice ({error}). Use a method that "
            "needs no second derivatives, such as 'l-bfgs'."
        )
