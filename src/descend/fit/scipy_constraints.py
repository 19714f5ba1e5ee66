"""SciPy's constraints, on functions of NumPy arrays, as those of ``minimize``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from descend.second_order.constraints import Constraint
from descend.second_order.mathematics.differences import SCHEMES, Vector, difference_jacobian, lengths
from descend.second_order.problem.array_objective import real_vector


class ArrayConstraint:
    """lower <= fun(x) <= upper, where fun is a function of an array.

    Args:
        fun: maps an array to a vector or a number.
        jac: returns the Jacobian, one row for each entry of ``fun``; or a scheme of differences.
        lower, upper: broadcast to the values; equal where the constraint is an equality.
        shape: of the array.
        bounds: flat lower and upper bounds of the array, within which differences stay.
        relative_step: length of the differences.
        name: for errors.
    """

    def __init__(
        self,
        fun: Callable[[Any], Any],
        jac: Callable[[Any], Any] | str,
        lower: Any,
        upper: Any,
        *,
        shape: tuple[int, ...],
        bounds: tuple[Vector, Vector],
        relative_step: Any = None,
        name: str,
    ) -> None:
        self.fun, self.jac, self.shape, self.bounds = fun, jac, shape, bounds
        self.lower, self.upper = np.asarray(lower, dtype=np.float64), np.asarray(upper, dtype=np.float64)
        self.relative_step, self.name = relative_step, name
        self._size: int | None = None  # of the values, once they have been computed
        self._last: tuple[Any, Tensor] | None = None  # the last argument, and the values there

    def values(self, x: Vector) -> Vector:
        with torch.enable_grad():
            values = real_vector(self.fun(x.reshape(self.shape).copy()), f"{self.name}: what fun returns")
        if self._size is None:
            self._size = values.size
            for side, end in (("lower", self.lower), ("upper", self.upper)):
                if end.size not in (1, values.size):
                    raise ValueError(
                        f"{self.name}: the {side} limit must be one number, or one for each of {values.size} values of "
                        f"fun, got {end.size}."
                    )
        if values.size != self._size:
            raise ValueError(
                f"{self.name}: fun must return as many values at each call, got {values.size} after {self._size}."
            )
        return values

    def jacobian(self, x: Vector, values: Vector) -> NDArray[np.float64]:
        if isinstance(self.jac, str):
            steps = lengths(x, self.jac, relative=self.relative_step)  # type: ignore[arg-type]
            return difference_jacobian(self.values, x, values, steps, self.jac, *self.bounds)  # type: ignore[arg-type]
        with torch.enable_grad():
            given = self.jac(x.reshape(self.shape).copy())
        dense = given.toarray() if hasattr(given, "toarray") else np.asarray(given, dtype=np.float64)
        if dense.size != values.size * x.size:
            raise ValueError(
                f"{self.name}: the Jacobian must have shape {(values.size, x.size)}, got {tuple(np.shape(dense))}."
            )
        jacobian: NDArray[np.float64] = dense.reshape(values.size, x.size)
        return jacobian

    def _tensor(self, x: Tensor) -> Tensor:
        """The values as a differentiable tensor; evaluated once for both kinds of constraints."""
        if self._last is None or self._last[0] is not x:
            self._last = x, _Values.apply(x.reshape(-1), self)  # type: ignore[no-untyped-call]
        return self._last[1]

    def equalities(self, x: Tensor) -> Tensor:
        values = self._tensor(x)
        lower, upper = self._sides(values)
        return (values - lower)[lower == upper]

    def inequalities(self, x: Tensor) -> Tensor:
        values = self._tensor(x)
        lower, upper = self._sides(values)
        is_free = lower != upper
        above = (values - lower)[is_free & torch.isfinite(lower)]
        return torch.cat([above, (upper - values)[is_free & torch.isfinite(upper)]])

    def _sides(self, values: Tensor) -> tuple[Tensor, Tensor]:
        sides = [torch.from_numpy(np.broadcast_to(side, values.shape).copy()) for side in (self.lower, self.upper)]
        return sides[0], sides[1]

    def as_constraints(self) -> list[Constraint]:
        """This constraint as those of ``minimize``, equalities first."""
        is_equal = self.lower == self.upper
        constraints = [Constraint(self.equalities, is_equality=True)] if is_equal.any() else []
        return constraints if is_equal.all() else [*constraints, Constraint(self.inequalities, is_equality=False)]

    def violation(self, x: Vector) -> float:
        """The largest violation at a point."""
        values = self.values(x)
        return float(np.max([self.lower - values, values - self.upper], initial=0.0)) if values.size else 0.0


class _Values(torch.autograd.Function):
    """Values of a constraint, whose derivative is its Jacobian, computed when it is first asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, constraint: ArrayConstraint) -> Tensor:
        ctx.constraint, ctx.x, ctx.jacobian = constraint, x.detach().numpy().copy(), None
        ctx.values = constraint.values(ctx.x)
        return torch.from_numpy(ctx.values.copy())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.jacobian is None:
            ctx.jacobian = torch.from_numpy(np.array(ctx.constraint.jacobian(ctx.x, ctx.values), dtype=np.float64))
        return ctx.jacobian.T @ grad, None


def array_constraints(
    constraints: Any, shape: tuple[int, ...], bounds: tuple[Vector, Vector], relative_step: Any, who: str
) -> list[ArrayConstraint]:
    """SciPy's constraints: dictionaries, ``NonlinearConstraint`` and ``LinearConstraint``, one or a sequence of them.

    Raises:
        TypeError, ValueError: if one is none of these.
    """
    options: dict[str, Any] = dict(shape=shape, bounds=bounds, relative_step=relative_step)
    given = list(constraints) if isinstance(constraints, Sequence) else [constraints]
    return [_constraint(one, f"{who}: constraints[{place}]", options) for place, one in enumerate(given)]


def _constraint(given: Any, name: str, options: dict[str, Any]) -> ArrayConstraint:
    from scipy.optimize import LinearConstraint, NonlinearConstraint

    if isinstance(given, LinearConstraint):
        matrix = given.A if hasattr(given.A, "toarray") else np.atleast_2d(np.asarray(given.A, dtype=np.float64))
        return ArrayConstraint(
            lambda x: matrix @ x.reshape(-1), lambda x: matrix, given.lb, given.ub, name=name, **options
        )
    if isinstance(given, NonlinearConstraint):
        jac = given.jac if callable(given.jac) or given.jac in SCHEMES else SCHEMES[0]
        return ArrayConstraint(given.fun, jac, given.lb, given.ub, name=name, **options)
    if not isinstance(given, dict):
        raise TypeError(
            f"{name} must be a dict with 'type' and 'fun', a NonlinearConstraint or a LinearConstraint, got {given!r}."
        )
    kind, fun, jac = str(given.get("type")).lower(), given.get("fun"), given.get("jac")
    if kind not in ("eq", "ineq") or not callable(fun):
        raise ValueError(f"{name} must have 'type' 'eq' or 'ineq' and a function 'fun', got {given!r}.")
    if not (callable(jac) or jac is None or jac in SCHEMES):
        raise TypeError(f"{name}: 'jac' must be a function, one of {SCHEMES} or None, got {jac!r}.")
    args = given.get("args", ())
    args = tuple(args) if np.iterable(args) else (args,)
    return ArrayConstraint(
        lambda x: fun(x, *args),
        (lambda x: jac(x, *args)) if callable(jac) else jac or SCHEMES[0],
        0.0,
        0.0 if kind == "eq" else np.inf,
        name=name,
        **options,
    )
