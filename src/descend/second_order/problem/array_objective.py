"""A function of NumPy arrays, with its derivatives, as an objective."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from descend.second_order.mathematics.differences import Scheme, Vector, difference_gradient, lengths
from descend.second_order.mathematics.space import Space, length
from descend.second_order.problem.objective import Curved, Point


class ArrayObjective(Curved):
    """A function of an array in float64; derivatives are the caller's own, or differences.

    Args:
        who: the caller's name, for errors.
        fun: maps an array to a number; with ``jac=True`` to (number, gradient).
        shape: of the array.
        jac: True, a function that returns the gradient, or a scheme of differences.
        hess: None, or a function that returns the Hessian: an array, a sparse matrix or a linear operator.
        hessp: None, or a function of a point and a vector that returns the Hessian's product. Without both, products
            are differences of gradients.
        bounds: flat lower and upper bounds.
        absolute_step, relative_step: lengths of the differences.
    Attributes:
        n_fun, n_jac, n_hess: calls of ``fun``, gradients that it or ``jac`` has given, or differences; calls of
            ``hess`` and ``hessp``.
    """

    def __init__(
        self,
        who: str,
        fun: Callable[..., Any],
        shape: tuple[int, ...],
        *,
        jac: Callable[..., Any] | bool | Scheme,
        hess: Callable[..., Any] | None = None,
        hessp: Callable[..., Any] | None = None,
        bounds: tuple[Tensor, Tensor] | None = None,
        absolute_step: Any = None,
        relative_step: Any = None,
    ) -> None:
        super().__init__(Space(math.prod(shape)), np.finfo(np.float64).eps, *(bounds or ()))
        self.who, self.fun, self.shape = who, fun, shape
        self.jac, self.hess, self.hessp = jac, hess, hessp
        self.absolute_step, self.relative_step = absolute_step, relative_step
        self.n_fun = self.n_jac = self.n_hess = 0
        self._hessian: tuple[Tensor, Any] | None = None  # the last one, and where

    def value_and_grad(self, x: Tensor) -> tuple[float, Tensor, None]:
        value, grad = self._evaluate(x.numpy())
        return value, torch.from_numpy(grad), None

    def _evaluate(self, x: Vector) -> tuple[float, Vector]:
        self.n_fun += 1
        given = self._call(self.fun, x)
        if self.jac is True:
            if not (isinstance(given, tuple | list) and len(given) == 2):
                raise TypeError(f"{self.who}: with jac=True fun must return (value, gradient), got {given!r}.")
            self.n_jac += 1
            return self._number(given[0]), self._vector(given[1], "the gradient from fun")
        value = self._number(given)
        if not math.isfinite(value):  # derivatives may not exist here
            return value, np.full_like(x, math.nan)
        self.n_jac += 1
        if isinstance(self.jac, str):
            return value, self._differences(x, value, self.jac)
        return value, self._vector(self._call(self.jac, x), "the gradient from jac")

    def _differences(self, x: Vector, value: float, scheme: Scheme) -> Vector:
        def fun(point: Vector) -> float:
            self.n_fun += 1
            return self._number(self._call(self.fun, point))

        steps = lengths(x, scheme, self.absolute_step, self.relative_step)
        return difference_gradient(fun, x, value, steps, scheme, *self.box)

    @property
    def box(self) -> tuple[Vector, Vector]:
        """The bounds as arrays; infinite where there is none."""
        if self.lower is None or self.upper is None:
            return np.full(self.space.numel, -math.inf), np.full(self.space.numel, math.inf)
        return self.lower.numpy(), self.upper.numpy()

    def product(self, point: Point, vector: Tensor) -> Tensor:
        self.n_hvp += 1
        v = vector.numpy()
        if self.hessp is not None:
            self.n_hess += 1
            product = self._call(self.hessp, point.x.numpy(), v.reshape(self.shape).copy())
        elif self.hess is not None:
            product = self._hessian_at(point) @ v
        else:
            return self._difference(point, vector)
        return torch.from_numpy(self._vector(product, "the product with the Hessian"))

    def _difference(self, point: Point, vector: Tensor) -> Tensor:
        """The Hessian times a vector by a forward difference of gradients.

        Source: Nocedal & Wright 2006, section 8.1, for the length of the difference.
        """
        step = math.sqrt(self.eps) * (1 + length(point.x)) / length(vector)
        ahead = self._evaluate(torch.add(point.x, vector, alpha=step).numpy())[1]
        return torch.from_numpy(ahead).sub_(point.grad).div_(step)

    def hessian(self, point: Point) -> Tensor:
        numel = point.x.numel()
        if self.hess is None:
            hessian = torch.stack([self.product(point, unit) for unit in torch.eye(numel, dtype=point.x.dtype)])
        else:
            self.n_hvp += numel
            given = self._hessian_at(point)
            dense = given if isinstance(given, np.ndarray) else given @ np.eye(numel)
            hessian = torch.from_numpy(np.array(dense, dtype=np.float64))
        return (hessian + hessian.T) / 2

    def _hessian_at(self, point: Point) -> Any:
        if self._hessian is None or self._hessian[0] is not point.x:
            assert self.hess is not None
            self.n_hess += 1
            hessian = self._call(self.hess, point.x.numpy())
            if not hasattr(hessian, "shape"):
                hessian = np.asarray(hessian, dtype=np.float64)
            numel = point.x.numel()
            if tuple(hessian.shape) != (numel, numel):
                raise ValueError(
                    f"{self.who}: the Hessian from hess must have shape {(numel, numel)}, got {tuple(hessian.shape)}."
                )
            self._hessian = point.x, hessian
        return self._hessian[1]

    def _call(self, function: Any, x: Vector, *vectors: NDArray[Any]) -> Any:
        """Call a function with a copy of x, which it may keep or change; it may use autograd, too."""
        with torch.enable_grad():
            return function(x.reshape(self.shape).copy(), *vectors)

    def _number(self, value: Any) -> float:
        array = np.asarray(value)
        if array.size != 1 or array.dtype.kind not in "fiub":
            got = f"an array of shape {array.shape}" if array.size != 1 else repr(value)
            raise TypeError(f"{self.who}: fun must return one real number, got {got}.")
        return float(array.item())

    def _vector(self, value: Any, what: str) -> Vector:
        vector = real_vector(value, f"{self.who}: {what}")
        if vector.size != self.space.numel:
            raise ValueError(f"{self.who}: {what} must have {self.space.numel} entries, as x0, got {vector.size}.")
        return vector


def real_vector(value: Any, who: str) -> Vector:
    """What a caller's function returned, copied, as a vector; an error unless it is made of real numbers."""
    try:
        if value is None or np.iscomplexobj(value):
            raise TypeError("no real numbers")
        return np.array(value, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{who} must be an array of real numbers, got {value!r:.80}.") from error
