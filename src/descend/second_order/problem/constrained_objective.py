"""The augmented Lagrangian of a function with constraints as an objective, each evaluated once a point."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
from descend.second_order.problem.objective import BATCH, Curved, Point, check_dense_fits, dense_hessian, scalar
from descend.second_order.problem.parameters import FlatParameters
from descend.second_order.problem.structure import Structure

CG_INSTEAD = "minimize(method='l-bfgs')"


class ConstraintFunction(NamedTuple):
    """One constraint.

    Attributes:
        fun: maps the function's argument to a real tensor, every entry of which is constrained.
        is_equality: whether the entries are to be 0, instead of >= 0.
        name: for errors.
    """

    fun: Callable[[Any], Any]
    is_equality: bool
    name: str


class Values:
    """The function and the constraints at a point, with the graph of their computation.

    Attributes:
        x: the point.
        leaves: what the graph begins with.
        fun, constraints: a scalar and a vector, scaled.
        value: of the function, not scaled.
        violation: largest one, scaled.
    """

    def __init__(self, x: Tensor, leaves: list[Tensor], fun: Tensor, constraints: Tensor) -> None:
        self.x, self.leaves, self.fun, self.constraints = x, leaves, fun, constraints
        self.value = self.violation = math.nan
        self.slope: tuple[int, list[Tensor | None]] | None = None  # gradient with a graph, and for which multipliers

    @property
    def c(self) -> Tensor:
        return self.constraints.detach()


class Candidate(NamedTuple):
    """A point, with the multipliers for which its gradient is the Lagrangian's."""

    point: Point
    multipliers: Tensor

    @property
    def values(self) -> Values:
        values: Values = self.point.graph
        return values


class ConstrainedObjective(Curved):
    """f + penalties, for multipliers and a penalty that the solver sets.

    Everything is scaled: f by ``fun_scale`` and each constraint by an entry of ``scales``, which are 1 until
    ``set_scales``. Points have their ``Values`` as ``graph``.

    Args:
        who: the caller's name, for errors.
        fun: maps the argument to a scalar tensor.
        constraints: at least one.
        structure: the argument's.
        parameters: None, or those that the argument is made of, which are set in place.
        argument: what ``fun`` gets then.
        bounds: flat lower and upper bounds.
    Attributes:
        feasible: violation, scaled, up to which a point is feasible; set by the solver.
        equal: which entries of the constraints are equalities.
        shapes: of the constraints.
        best: the lowest feasible point evaluated, or the least infeasible one if none is feasible.
        fun_weight: 1, or 0 to minimize the violation alone.
    """

    def __init__(
        self,
        who: str,
        fun: Callable[[Any], Any],
        constraints: Sequence[ConstraintFunction],
        structure: Structure,
        *,
        parameters: FlatParameters | None = None,
        argument: Any = None,
        bounds: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__(Space(structure.numel), structure.eps, *(bounds or ()))
        self.who, self.fun, self.constraint_list, self.structure = who, fun, constraints, structure
        self.parameters, self.argument, self.feasible = parameters, argument, 0.0
        self.shapes: list[torch.Size] = []
        self.fun_scale, self.fun_weight, self.penalty = 1.0, 1.0, 1.0
        empty = torch.zeros(0, dtype=structure.dtype, device=structure.device)
        self.scales = self.multipliers = empty
        self.equal = empty.bool()
        self.best: Candidate | None = None
        self._version = 0
        self._held: Values | None = None  # at the parameters' present values
        self._known: Values | None = None  # at a point that may be asked for again

    def evaluate(self, x: Tensor, direction: Tensor | None = None, origin: Point | None = None) -> Point:
        if self.is_known(x):
            self.n_eval -= 1  # nothing is called
        point = super().evaluate(x, direction, origin)
        if point.graph is None:
            return point._replace(graph=Values(x, [], torch.tensor(math.nan), self.multipliers * math.nan))
        if point.is_finite and self.fun_weight:
            self._compare(point)
        return point

    def value_and_grad(self, x: Tensor) -> tuple[Tensor | float, Tensor, Any]:
        values = self._known if self.is_known(x) and self._known is not None else self.values_at(x)
        if not math.isfinite(values.value) or not math.isfinite(values.violation):
            return math.nan, torch.full_like(x, math.nan), values
        value = self.fun_weight * values.fun.detach()
        value = value + penalty_term(values.c, self.multipliers, self.penalty, self.equal)
        return value, self.lagrangian_gradient(values, self.first_order_multipliers(values)), values

    def values_at(self, x: Tensor) -> Values:
        """Call the function and the constraints."""
        if self.parameters is None:
            leaf, version = x.detach().requires_grad_(), x._version
            leaves, argument = [leaf], self.structure.unflatten(leaf.detach())
        else:
            self.parameters.scatter_(x)
            leaves, argument = [param for param in self.parameters.params if param.requires_grad], self.argument
        with torch.enable_grad():
            if self.parameters is None:
                argument = self.structure.unflatten(leaf)
            fun = self._checked(scalar(self.fun(argument), f"{self.who}: fun"), f"{self.who}: fun")
            parts = [self._constraint(constraint, argument) for constraint in self.constraint_list]
            shapes = [part.shape for part in parts]
            flat = torch.cat([part.reshape(-1).to(self.structure.device, self.structure.dtype) for part in parts])
            if not self.shapes:
                self._begin(shapes)
            if shapes != self.shapes:
                raise ValueError(
                    f"{self.who}: constraints must keep their shapes, got {[tuple(shape) for shape in shapes]} after "
                    f"{[tuple(shape) for shape in self.shapes]}."
                )
            values = Values(x, leaves, self.fun_scale * fun, self.scales * flat)
        if self.parameters is None and x._version != version:
            raise RuntimeError(f"{self.who}: fun or a constraint changed its argument in place. Let it work on a copy.")
        values.value = float(fun.detach())
        is_finite = bool(flat.detach().isfinite().all())
        values.violation = largest(violations(values.c, self.equal)) if is_finite else math.nan
        self._held = values
        return values

    def move_to(self, x: Tensor) -> None:
        """Set the parameters to ``x``, unless they are there."""
        if self.parameters is not None and (self._held is None or self._held.x is not x):
            self.parameters.scatter_(x)
            self._held = None

    def forget_x(self) -> None:
        """Mark the parameters as changed from outside, so that the next evaluation sets them again."""
        self._held = None

    def _constraint(self, constraint: ConstraintFunction, argument: Any) -> Tensor:
        part, who = constraint.fun(argument), f"{self.who}: {constraint.name}"
        if not isinstance(part, Tensor):
            raise TypeError(f"{who} must return a tensor, got {type(part).__name__}.")
        if not part.is_floating_point():
            raise ValueError(f"{who} must return a real floating point tensor, got {part.dtype}.")
        return self._checked(part, who)

    def _checked(self, part: Tensor, who: str) -> Tensor:
        if part.requires_grad or not part.numel() or not bool(part.isfinite().all()) or self.n_eval > 1:
            return part
        raise RuntimeError(
            f"{who} returned a value that does not depend on its argument as far as autograd can see: compute it with "
            "torch operations, without detach(), item() or no_grad()."
        )

    def _begin(self, shapes: list[torch.Size]) -> None:
        self.shapes = shapes
        sizes = [shape.numel() for shape in shapes]
        kinds = [constraint.is_equality for constraint in self.constraint_list]
        self.scales = torch.ones(sum(sizes), dtype=self.structure.dtype, device=self.structure.device)
        self.multipliers = torch.zeros_like(self.scales)
        self.equal = torch.cat([self.scales.new_full((n,), kind).bool() for n, kind in zip(sizes, kinds, strict=True)])

    def is_known(self, x: Tensor) -> bool:
        """Whether a point can be evaluated without calling anything."""
        known = self._known
        return known is not None and known.x is x and (self.parameters is None or self._held is known)

    def _compare(self, point: Point) -> None:
        candidate = Candidate(point, self.first_order_multipliers(point.graph))
        if self.best is None or self.rank(candidate.values) < self.rank(self.best.values):
            self.best = candidate

    def rank(self, values: Values) -> tuple[bool, float]:
        """Sorts points: feasible ones by their value, then the others by their violation."""
        is_infeasible = not values.violation <= self.feasible
        return is_infeasible, values.violation if is_infeasible else values.value

    def set_scales(self, values: Values) -> None:
        """Scale the function and the constraints to gradients with entries of at most 1 at a point."""
        gradient = self._gradient(values, 1.0, None)
        self.fun_scale = 1 / max(1.0, largest(gradient))
        self.scales = 1 / self._row_sizes(values).clamp(min=1.0)
        with torch.enable_grad():
            values.fun, values.constraints = self.fun_scale * values.fun, self.scales * values.constraints
        values.violation = largest(violations(values.c, self.equal))
        self.best = None

    def _row_sizes(self, values: Values) -> Tensor:
        """Largest entry in each row of the Jacobian; if it has many entries, an estimate for each constraint."""
        if len(self.scales) * values.x.numel() <= BATCH and len(self.scales) <= 100:
            jacobian = self.jacobian(values)
            return jacobian.abs().amax(1) if jacobian.numel() else torch.ones_like(self.scales)
        sizes = []
        for part in torch.split(torch.arange(len(self.scales)), [shape.numel() for shape in self.shapes]):
            signs = torch.zeros_like(self.scales)
            signs[part] = torch.where(part % 2 == 0, 1.0, -1.0).to(signs)
            size = largest(self._gradient(values, 0.0, signs))
            sizes.append(signs.new_full((len(part),), size))
        return torch.cat(sizes)

    def remember(self, values: Values) -> None:
        """Keep what a point is evaluated to, in case it is asked for next."""
        self._known = values

    def set_multipliers(self, multipliers: Tensor, penalty: float, fun_weight: float = 1.0) -> None:
        self.multipliers, self.penalty, self.fun_weight = multipliers, penalty, fun_weight
        self._version += 1

    def first_order_multipliers(self, values: Values) -> Tensor:
        return updated_multipliers(values.c, self.multipliers, self.penalty, self.equal)

    def lagrangian_gradient(self, values: Values, multipliers: Tensor) -> Tensor:
        """The gradient of f - multipliers'c, scaled."""
        return self._gradient(values, self.fun_weight, -multipliers)

    def function_gradient(self, values: Values) -> Tensor:
        return self._gradient(values, 1.0, None)

    def _gradient(self, values: Values, fun_weight: float, weights: Tensor | None) -> Tensor:
        outputs = [(values.fun, values.fun.detach() * 0 + fun_weight)] if values.fun.requires_grad else []
        if weights is not None and values.constraints.requires_grad:
            outputs.append((values.constraints, weights))
        if not outputs:
            return torch.zeros_like(values.x)
        tensors, vectors = zip(*outputs, strict=True)
        parts = torch.autograd.grad(tensors, values.leaves, vectors, retain_graph=True, allow_unused=True)
        return self._flat(parts)

    def _flat(self, parts: Sequence[Tensor | None]) -> Tensor:
        if self.parameters is None:
            return torch.zeros(self.structure.numel).to(self.scales) if parts[0] is None else parts[0].detach()
        remaining = iter(parts)
        return self.parameters.flatten(
            [next(remaining) if param.requires_grad else None for param in self.parameters.params]
        )

    def jacobian(self, values: Values) -> Tensor:
        """Of the constraints, scaled, shape (M, N)."""
        if not values.constraints.requires_grad:
            return values.x.new_zeros(len(self.scales), values.x.numel())
        units = torch.eye(len(self.scales)).to(self.scales)
        return torch.stack([self._gradient(values, 0.0, unit) for unit in units]) if len(units) else units

    def usable(self, values: Values) -> Values:
        """The values with a graph that is valid; evaluated again if parameters have moved on."""
        if self.parameters is None or self._held is values:
            return values
        self.n_eval += 1
        return self.values_at(values.x)

    def lagrangian_hessian(self, values: Values, multipliers: Tensor) -> Tensor:
        """The Hessian of f - multipliers'c, scaled."""
        with torch.enable_grad():
            total = values.fun - (multipliers * values.constraints).sum()
            slope = torch.autograd.grad(total, values.leaves, create_graph=True, allow_unused=True)
        return dense_hessian(values.x, lambda units: self._rows(values, slope, units), self._row(values, slope))

    def product(self, point: Point, vector: Tensor) -> Tensor:
        self.n_hvp += 1
        values = self.usable(point.graph)
        return self._backward_twice(values, self._slope(values), vector)

    def hessian(self, point: Point) -> Tensor:
        check_dense_fits(self.who, point.x, CG_INSTEAD, self.space)
        self.n_hvp += point.x.numel()
        values = self.usable(point.graph)
        slope = self._slope(values)
        return dense_hessian(point.x, lambda units: self._rows(values, slope, units), self._row(values, slope))

    def _slope(self, values: Values) -> Sequence[Tensor | None]:
        if values.slope is None or values.slope[0] != self._version:
            with torch.enable_grad():
                term = penalty_term(values.constraints, self.multipliers, self.penalty, self.equal)
                total = self.fun_weight * values.fun + term
                parts = torch.autograd.grad(total, values.leaves, create_graph=True, allow_unused=True)
            values.slope = self._version, list(parts)
        return values.slope[1]

    def _rows(self, values: Values, slope: Sequence[Tensor | None], units: Tensor) -> Tensor:
        return torch.stack([self._backward_twice(values, slope, unit) for unit in units])

    def _row(self, values: Values, slope: Sequence[Tensor | None]) -> Callable[[Tensor], Tensor]:
        return lambda unit: self._backward_twice(values, slope, unit)

    def _backward_twice(self, values: Values, slope: Sequence[Tensor | None], vector: Tensor) -> Tensor:
        if self.parameters is None:
            pieces: Sequence[Tensor] = [vector]
        else:
            split = zip(self.parameters.params, self.parameters.split(vector), strict=True)
            pieces = [piece for param, piece in split if param.requires_grad]
        pairs = [
            (part, piece) for part, piece in zip(slope, pieces, strict=True) if part is not None and part.requires_grad
        ]
        if not pairs:
            return torch.zeros_like(values.x)
        parts, vectors = zip(*pairs, strict=True)
        return self._flat(torch.autograd.grad(parts, values.leaves, vectors, retain_graph=True, allow_unused=True))
