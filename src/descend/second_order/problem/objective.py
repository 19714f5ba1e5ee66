"""Objectives: functions of one flat vector, with gradient, curvature, bounds and counts of evaluations."""

from __future__ import annotations

import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from descend.backends.cpu.vectors import look_along
from descend.second_order.mathematics.space import Space
from descend.second_order.problem.domain import NEVER, DomainErrors
from descend.second_order.problem.graphs import is_compiled, nodes_of
from descend.second_order.problem.structure import Structure

CG_INSTEAD = "minimize(method='newton-cg') or Newton(solver='cg')"
LONG = 2**16  # entries of a vector for which it pays to compile a pass
TINY = 1e-30  # slope below which float32 has lost some of it
BATCH = 2**22  # numbers in the vectors that are multiplied by a Hessian at once
DENSE_COPIES = 4  # the Hessian, its symmetric part, a factor, and the workspace of the factorization


class Point(NamedTuple):
    """An evaluated point.

    Attributes:
        x: flat vector, never written to.
        grad: flat gradient.
        value: of the function; may be NaN or infinite.
        norm: largest absolute entry of the (projected) gradient; NaN or infinite if the gradient is.
        slope: inner product of the gradient and the direction that led here.
        slope_before: inner product of the gradient at the direction's origin and the direction.
        graph: for second derivatives, if the objective needs them.
        measured: ``Objective.measure`` of the pair from the direction's origin to here, summed over all ranks.
    """

    x: Tensor
    grad: Tensor
    value: float
    norm: float
    slope: float = 0.0
    slope_before: float = 0.0
    graph: Any = None
    measured: Sequence[Any] = ()

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.value) and math.isfinite(self.norm)


class Objective(ABC):
    """A function of a flat vector, with bounds and counts.

    Args:
        space: of the vectors.
        eps: relative rounding error of its values.
        lower, upper: flat bounds, both or none.
    Attributes:
        domain_errors: exceptions that mean, as NaN does, that a point is outside the function's domain; a failed
            factorization always does.
        measure: maps a step and the change of the gradient along it to the sums that a learner asks for.
    """

    domain_errors: DomainErrors = ()
    measure: Callable[[Tensor, Tensor], Sequence[Any]] | None = None

    def __init__(self, space: Space, eps: float, lower: Tensor | None = None, upper: Tensor | None = None) -> None:
        self.space, self.eps = space, eps
        self.lower, self.upper = lower, upper
        self.n_eval = 0
        self.n_hvp = 0

    def spare_vector(self) -> Tensor | None:
        """Memory for a new point; None if it is to be allocated."""
        return None

    def recycle(self, point: Point) -> None:
        """Take back the vectors of a point that nothing refers to any more: new memory costs more than a pass."""
        return

    @abstractmethod
    def value_and_grad(self, x: Tensor) -> tuple[Tensor | float, Tensor, Any]:
        """Value, flat gradient and ``graph`` at ``x``."""

    def evaluate(self, x: Tensor, direction: Tensor | None = None, origin: Point | None = None) -> Point:
        """Evaluate and count; ``direction`` leads from ``origin`` to ``x``. One transfer from the device.

        Where ranks share the vectors, it is one collective; they come here together.
        """
        self.n_eval += 1
        try:
            value, grad, graph = self.value_and_grad(x)
        except (torch.linalg.LinAlgError, *self.domain_errors) as error:  # type: ignore[attr-defined]
            if origin is None or isinstance(error, NEVER):  # at the start
                raise
            value, grad, graph = math.nan, torch.full_like(x, math.nan), None
        if direction is None or origin is None:
            low, high = self._range(x, grad)
            value, low, high = self.space.evaluation(x.device, value, low, high)
            return Point(x, grad, value, max(high, -low), graph=graph)
        slope: Any
        before: Any
        if self.lower is None and x.is_cpu and x.numel() >= LONG:
            vectors = grad, direction, origin.grad
            slope, before, high = look_along(*(vector.contiguous() for vector in vectors))
            low = -high
        else:
            low, high = self._range(x, grad)
            slope, before = grad.dot(direction), origin.grad.dot(direction)
        parts = () if self.measure is None else self.measure(x - origin.x, grad - origin.grad)
        value, low, high, slope, before, *measured = self.space.evaluation(
            x.device, value, low, high, slope, before, *parts
        )
        if x.dtype == torch.float32 and not TINY < abs(before) < math.inf:
            direction = direction.double()
            doubles = grad.double().dot(direction), origin.grad.double().dot(direction)
            slope, before = self.space.floats(x.device, *doubles)
        return Point(x, grad, value, max(high, -low), float(slope), float(before), graph, measured)

    def _range(self, x: Tensor, grad: Tensor) -> tuple[Any, Any]:
        """Least and largest entry of the projected gradient; NaN, if there is one."""
        # x - clamp(x - grad), without rounding x - grad.
        if self.lower is not None and self.upper is not None:
            grad = torch.clamp(grad, x - self.upper, x - self.lower)
        return torch.aminmax(grad) if x.numel() else (0.0, 0.0)


class Curved(Objective):
    """An objective with second derivatives."""

    @abstractmethod
    def product(self, point: Point, vector: Tensor) -> Tensor:
        """The Hessian at ``point`` times ``vector``; counts as one product."""

    @abstractmethod
    def hessian(self, point: Point) -> Tensor:
        """The dense, symmetric Hessian at ``point``; counts as one product per variable."""


class FunctionObjective(Curved):
    """A function of a structure of tensors, differentiated by autograd or by the caller's own functions.

    Args:
        who: the caller's name, for errors.
        fun: maps the structure to a scalar tensor; with ``jac=True`` to (scalar, gradient).
        structure: the argument's.
        jac: None for autograd, True, or a function from the structure to the gradient in the same structure.
        hvp: None for autograd, or a function of the structure and a vector in it that returns the Hessian's product.
        needs_curvature: whether ``product`` or ``hessian`` will be called.
        bounds: flat lower and upper bounds.
    Attributes:
        keeps_graph: whether points get the gradient with its graph, and the argument in it, as ``graph``.
    """

    def __init__(
        self,
        who: str,
        fun: Callable[..., Any],
        structure: Structure,
        *,
        jac: Callable[..., Any] | bool | None = None,
        hvp: Callable[..., Any] | None = None,
        needs_curvature: bool = False,
        bounds: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__(Space(structure.numel), structure.eps, *(bounds or ()))
        self.who, self.fun, self.structure, self.jac, self.hvp = who, fun, structure, jac or None, hvp
        self.keeps_graph = needs_curvature and hvp is None

    def value_and_grad(self, x: Tensor) -> tuple[Tensor | float, Tensor, Any]:
        with torch.enable_grad():
            is_differentiated = self.jac is None or self.keeps_graph
            leaf, version = x.detach().requires_grad_(is_differentiated), x._version
            argument = self.structure.unflatten(leaf)
            value = self.fun(argument)
            given_grad = None
            if self.jac is True:
                if not (isinstance(value, tuple | list) and len(value) == 2):
                    raise TypeError(f"{self.who}: with jac=True fun must return (value, gradient), got {value!r}.")
                value, given_grad = value
            elif self.jac is not None:
                given_grad = self.jac(argument)
            value = scalar(value, f"{self.who}: fun")
            if self.jac is None:
                grad = gradient(value, leaf, f"{self.who}: fun", create_graph=self.keeps_graph)
            else:
                grad = self.structure.flatten(
                    self.structure.like(given_grad, f"{self.who}: the gradient from jac"), self.keeps_graph
                )
                grad = grad.clone()  # the caller may reuse its buffer
                if self.keeps_graph and self.hvp is None and not grad.requires_grad:
                    raise RuntimeError(
                        f"{self.who}: autograd cannot see how the gradient from jac depends on x. Give products with "
                        "the Hessian as hvp=, or compute jac with torch operations."
                    )
        if x._version != version:
            raise RuntimeError(f"{self.who}: fun or jac changed its argument in place. Let it work on a copy.")
        return value.detach(), grad.detach(), (grad, leaf) if self.keeps_graph else None

    def product(self, point: Point, vector: Tensor) -> Tensor:
        self.n_hvp += 1
        if self.hvp is not None:
            with torch.enable_grad():
                product = self.hvp(self.structure.unflatten(point.x.clone()), self.structure.unflatten(vector.clone()))
            return self.structure.flatten(self.structure.like(product, f"{self.who}: the product from hvp")).clone()
        try:
            grad, leaf = point.graph
            return backward_twice(grad, leaf, vector)
        except RuntimeError as error:
            # The backward of some operation has no derivative; forward-mode differentiation may work.
            try:
                if self.jac is None:
                    with warnings.catch_warnings():  # about torch's own imports
                        warnings.simplefilter("ignore", DeprecationWarning)
                        return self._forward_over_reverse(point.x, vector)
            except RuntimeError:
                pass
            raise RuntimeError(
                f"{self.who}: fun cannot be differentiated twice ({error}). Give products with the Hessian as hvp=, or "
                "use a method that needs none, such as 'l-bfgs'."
            ) from error

    def _forward_over_reverse(self, x: Tensor, vector: Tensor) -> Tensor:
        slope = torch.func.grad(lambda flat: self.fun(self.structure.unflatten(flat)).reshape(()))
        product: Tensor = torch.func.jvp(slope, (x,), (vector,))[1]
        return product

    def hessian(self, point: Point) -> Tensor:
        check_dense_fits(self.who, point.x, CG_INSTEAD, self.space)
        self.n_hvp += point.x.numel()

        def rows(units: Tensor) -> Tensor:
            if self.hvp is not None:
                return torch.stack([row(unit) for unit in units])
            grad, leaf = point.graph
            return backward_twice(grad, leaf, units, is_batched=True)

        def row(unit: Tensor) -> Tensor:
            self.n_hvp -= 1  # already counted
            return self.product(point, unit)

        return dense_hessian(point.x, rows, row)


def scalar(value: Any, who: str) -> Tensor:
    """The value of a function as a 0-dimensional tensor; an error unless it is a real scalar tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{who} must return a scalar tensor, got {type(value).__name__}. Compute it with torch operations."
        )
    if value.numel() != 1 or not value.is_floating_point():
        instead = "take its .real or .abs()" if value.is_complex() else "compute it with floating point numbers"
        if value.numel() != 1:
            instead = "reduce it, e.g. with .sum()"
        raise ValueError(
            f"{who} must return a real scalar tensor, got shape {tuple(value.shape)} and {value.dtype}; {instead}."
        )
    return value.reshape(()) if value.dim() else value


def gradient(value: Tensor, leaf: Tensor, who: str, *, create_graph: bool) -> Tensor:
    """The gradient of a scalar; an error if it does not depend on the leaf."""
    if value.requires_grad:
        (grad,) = torch.autograd.grad(value, leaf, create_graph=create_graph, allow_unused=True)
        if grad is not None:
            return grad
    if not math.isfinite(value.item()):  # a constant that marks the end of the domain
        return torch.full_like(leaf, math.nan)
    raise RuntimeError(
        f"{who} returned a value that does not depend on its argument as far as autograd can see: compute it with "
        "torch operations, without detach(), item() or no_grad(), or give its gradient as jac=."
    )


def backward_twice(grad: Tensor, leaf: Tensor, vector: Tensor, *, is_batched: bool = False) -> Tensor:
    """The Hessian times a vector, or times each row of a matrix, from the graph of the gradient."""
    if not grad.requires_grad:  # a linear function
        return torch.zeros_like(vector)
    (product,) = torch.autograd.grad(
        grad, leaf, vector, retain_graph=True, allow_unused=True, is_grads_batched=is_batched
    )
    if product is None and is_compiled(nodes_of(grad)):
        raise RuntimeError("the backward of a function made by torch.compile has no graph; pass the function itself")
    return torch.zeros_like(vector) if product is None else product


def dense_hessian(x: Tensor, rows: Callable[[Tensor], Tensor], row: Callable[[Tensor], Tensor]) -> Tensor:
    """The symmetrized Hessian from products with unit vectors, as many at once as ``BATCH`` numbers allow.

    Args:
        x: the point; gives size, dtype and device.
        rows: multiplies the Hessian by each row of a matrix.
        row: multiplies it by a vector, where batching fails.
    """
    numel = x.numel()
    block = max(1, BATCH // max(numel, 1))
    blocks = [x.new_zeros(0, numel)]
    for start in range(0, numel, block):
        units = x.new_zeros(min(block, numel - start), numel)
        units.diagonal(start).fill_(1.0)
        try:
            blocks.append(rows(units))
        except RuntimeError:  # an operation that cannot be batched
            blocks.append(torch.stack([row(unit) for unit in units]))
    hessian = torch.cat(blocks)
    return (hessian + hessian.T) / 2


def check_dense_fits(who: str, x: Tensor, instead: str, space: Space) -> None:
    """Raise ``MemoryError`` if a dense matrix for ``x``, with its factors, would not fit into memory.

    Raises:
        ValueError: if ranks share the variables: there are no dense matrices of sharded ones.
    """
    if space.is_shared:
        raise ValueError(
            f"{who}: a dense matrix needs all variables in one process, but they are sharded. Use {instead}."
        )
    needed = DENSE_COPIES * x.numel() ** 2 * x.element_size()
    available = free_memory(x.device)
    if needed > available:
        raise MemoryError(
            f"{who}: a dense matrix for {x.numel():,} variables needs {needed / 2**30:,.1f} GiB with its factors, "
            f"{available / 2**30:,.1f} GiB are free. Use {instead}, which needs a few vectors only."
        )


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            available = next(line for line in lines if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**34
