"""A function and its constraints, each called once a point, with derivatives of any combination."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from descend.second_order.problem.objective import dense_hessian, scalar
from descend.second_order.problem.parameters import FlatParameters
from descend.second_order.problem.structure import Structure


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
        leaves: of the graph.
        fun: a scalar.
        constraints: all entries of all constraints, a vector.
        value: of the function; NaN where nothing is defined.
        violation: the largest one, as scaled by the objective.
    """

    def __init__(self, x: Tensor, leaves: Sequence[Tensor], fun: Tensor, constraints: Tensor) -> None:
        self.x, self.leaves, self.fun, self.constraints = x, leaves, fun, constraints
        self.value, self.violation = float(fun.detach()), math.nan

    def release(self) -> None:
        """Drop the graph, and the memory that it takes."""
        self.fun, self.constraints, self.leaves = self.fun.detach(), self.constraints.detach(), ()


class ConstrainedFunctions:
    """A function and constraints of one argument.

    Args:
        who: the caller's name, for errors.
        fun: maps the argument to a scalar tensor.
        constraints: at least one.
        structure: the argument's.
        parameters: None, or those that the argument is made of, which are set in place.
        argument: of the functions in this case.
    Attributes:
        shapes: of the constraints, once they have been called.
        keeps_graphs: whether all ``Values`` stay differentiable; else the newest ones alone. In-place changes of
            parameters leave no choice.
    """

    def __init__(
        self,
        who: str,
        fun: Callable[[Any], Any],
        constraints: Sequence[ConstraintFunction],
        structure: Structure,
        parameters: FlatParameters | None,
        argument: Any,
    ) -> None:
        self.who, self.fun, self.constraints, self.structure = who, fun, constraints, structure
        self.parameters, self.argument = parameters, argument
        self.keeps_graphs = parameters is None
        self.shapes: list[torch.Size] = []
        self._newest: Values | None = None

    def call(self, x: Tensor) -> Values:
        """The values at a point."""
        if self._newest is not None and not self.keeps_graphs:
            self._newest.release()
            self._newest = None
        with torch.enable_grad():
            leaves, argument, version = self._argument(x), self.argument, x._version
            if self.parameters is None:
                argument = self.structure.unflatten(leaves[0])
            fun = scalar(self.fun(argument), f"{self.who}: fun").to(self.structure.device)
            parts = [self._constraint(constraint, argument) for constraint in self.constraints]
            flat = torch.cat([part.reshape(-1).to(self.structure.device, self.structure.dtype) for part in parts])
        if self.parameters is None and x._version != version:
            raise RuntimeError(f"{self.who}: fun or a constraint changed its argument in place. Let it work on a copy.")
        self._check(leaves, fun, parts)
        self._newest = Values(x, leaves, fun, flat)
        return self._newest

    def is_usable(self, values: Values) -> bool:
        """Whether the values can be differentiated."""
        return values is self._newest or (self.keeps_graphs and bool(values.leaves))

    def move_to(self, x: Tensor) -> None:
        """Set the parameters to ``x``, unless they are there."""
        if self.parameters is not None and (self._newest is None or self._newest.x is not x):
            self.parameters.scatter_(x)
            self._newest = None

    def forget_x(self) -> None:
        """Mark the parameters as changed from outside, so that the next evaluation sets them again."""
        self._newest = None

    def _argument(self, x: Tensor) -> list[Tensor]:
        if self.parameters is None:
            return [x.detach().requires_grad_()]
        with torch.no_grad():
            self.parameters.scatter_(x)
        return [param for param in self.parameters.params if param.requires_grad]

    def _constraint(self, constraint: ConstraintFunction, argument: Any) -> Tensor:
        part, who = constraint.fun(argument), f"{self.who}: {constraint.name}"
        if not isinstance(part, Tensor):
            raise TypeError(f"{who} must return a tensor, got {type(part).__name__}.")
        if not part.is_floating_point():
            raise ValueError(f"{who} must return a real floating point tensor, got {part.dtype}.")
        return part

    def _check(self, leaves: list[Tensor], fun: Tensor, parts: list[Tensor]) -> None:
        """Raise unless shapes are those of the first call, and, there, everything depends on the argument."""
        shapes = [part.shape for part in parts]
        if not self.shapes:
            for part, name in zip((fun, *parts), ("fun", *(one.name for one in self.constraints)), strict=True):
                if part.numel() and bool(part.isfinite().all()) and not _depends(part, leaves):
                    raise RuntimeError(
                        f"{self.who}: {name} returned a value that does not depend on its argument as far as autograd "
                        "can see: compute it with torch operations, without detach(), item() or no_grad()."
                    )
            self.shapes = shapes
        if shapes != self.shapes:
            raise ValueError(
                f"{self.who}: constraints must keep their shapes, got {[tuple(shape) for shape in shapes]} after "
                f"{[tuple(shape) for shape in self.shapes]}."
            )

    def name_of(self, place: int) -> str:
        """The name of an entry of all constraints."""
        for constraint, shape in zip(self.constraints, self.shapes, strict=True):
            if place < shape.numel():
                return constraint.name if shape.numel() == 1 else f"entry {place} of {constraint.name}"
            place -= shape.numel()
        raise IndexError(place)

    def gradient(self, values: Values, fun_weight: float, weights: Tensor | None = None) -> Tensor:
        """The gradient of fun_weight * fun + weights'constraints, flat."""
        outputs = [(values.fun, torch.full_like(values.fun, fun_weight))] if values.fun.requires_grad else []
        if weights is not None and values.constraints.requires_grad:
            outputs.append((values.constraints, weights))
        return self._differentiate(values, *zip(*outputs, strict=True)) if outputs else torch.zeros_like(values.x)

    def jacobian(self, values: Values) -> Tensor:
        """Of the constraints, shape (M, N)."""
        units = torch.eye(len(values.constraints)).to(values.constraints)
        rows = [self.gradient(values, 0.0, unit) for unit in units]
        return torch.stack(rows) if rows else values.x.new_zeros(0, values.x.numel())

    def slope(self, values: Values, combination: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor | None]:
        """The gradient of a combination of fun and constraints, with a graph of its own."""
        with torch.enable_grad():
            total = combination(values.fun, values.constraints)
            return list(torch.autograd.grad(total, values.leaves, create_graph=True, allow_unused=True))

    def product(self, values: Values, slope: Sequence[Tensor | None], vector: Tensor) -> Tensor:
        """The derivative of a ``slope`` along a vector: a Hessian times the vector."""
        pieces: Sequence[Tensor] = [vector]
        if self.parameters is not None:
            split = zip(self.parameters.params, self.parameters.split(vector), strict=True)
            pieces = [piece for param, piece in split if param.requires_grad]
        pairs = [(part, piece) for part, piece in zip(slope, pieces, strict=True) if part is not None]
        pairs = [(part, piece) for part, piece in pairs if part.requires_grad]
        return self._differentiate(values, *zip(*pairs, strict=True)) if pairs else torch.zeros_like(values.x)

    def hessian(self, values: Values, slope: Sequence[Tensor | None]) -> Tensor:
        """The dense Hessian of the function whose gradient is ``slope``."""

        def row(unit: Tensor) -> Tensor:
            return self.product(values, slope, unit)

        return dense_hessian(values.x, lambda units: torch.stack([row(unit) for unit in units]), row)

    def _differentiate(self, values: Values, outputs: Any, vectors: Any) -> Tensor:
        parts = torch.autograd.grad(outputs, values.leaves, vectors, retain_graph=True, allow_unused=True)
        if self.parameters is None:
            return torch.zeros_like(values.x) if parts[0] is None else parts[0].detach()
        remaining = iter(parts)
        return self.parameters.flatten(
            [next(remaining) if param.requires_grad else None for param in self.parameters.params]
        )


def _depends(part: Tensor, leaves: list[Tensor]) -> bool:
    if not part.requires_grad:
        return False
    grads = torch.autograd.grad(part, leaves, torch.ones_like(part), retain_graph=True, allow_unused=True)
    return any(grad is not None for grad in grads)
