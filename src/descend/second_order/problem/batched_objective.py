"""The objective of many problems: one call of the user's function for all that have not finished."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from descend.second_order.mathematics.arrays import array_of, keep, largest_entries, library, take, tensor_of
from descend.second_order.mathematics.space import Array
from descend.second_order.problem.batched_structure import BatchedStructure
from descend.second_order.problem.domain import NEVER, DomainErrors

ALONE = "Every problem must be computed from its own rows of x and of args; what else depends on the problem goes there"


class Graph(NamedTuple):
    """What second derivatives at an evaluation are computed from: the problems, their gradients and points."""

    rows: Array
    grad: Tensor
    leaf: Tensor


class BatchedObjective:
    """A function of K problems at once, with gradients, bounds and a count of its calls.

    Args:
        who: the caller's name, for errors.
        fun: maps the structure of K problems, and ``args``, to values of shape (K,); with ``jac=True`` to (values,
            gradients).
        structure: of all B problems.
        args: further arguments. Tensors in them whose first dimension is B are cut to the K problems.
        jac: None for autograd, True, or a function to the gradients in the structure of the first argument.
        bounds: lower and upper bounds, (B, n).
        domain_errors: exceptions of ``fun`` that mean, as NaN does, that a point is outside of its domain; a failed
            factorization always does.
        keeps_graph: whether ``hessians`` will be called.
    Attributes:
        rows: the problems that are left, as positions among all of them.
        n_calls: calls of ``fun``.
    """

    name = "fun"  # of the function, for errors

    def __init__(
        self,
        who: str,
        fun: Callable[..., Any],
        structure: BatchedStructure,
        args: tuple[Any, ...] = (),
        jac: Callable[..., Any] | bool | None = None,
        bounds: tuple[Tensor, Tensor] | None = None,
        domain_errors: DomainErrors = (),
        keeps_graph: bool = False,
    ) -> None:
        self.who, self.fun, self.structure, self.jac = who, fun, structure, jac or None
        self.walls: DomainErrors = (torch.linalg.LinAlgError, *domain_errors)  # type: ignore[attr-defined]
        self.eps = structure.whole.eps
        self.n_calls = 0
        self.keeps_graph = keeps_graph
        self.graphs: list[Graph] = []
        self.rows = array_of(torch.arange(structure.count, device=structure.whole.device))
        self.lower: Array | None = None
        if bounds is not None:
            self.lower, self.upper = map(array_of, bounds)
        self.leaves, self.spec = pytree.tree_flatten(args)
        self.is_cut = [isinstance(leaf, Tensor) and leaf.shape[:1] == (structure.count,) for leaf in self.leaves]

    def keep(self, rows: Array) -> None:
        """Leave out all problems but these."""
        keep(self, ("rows",) if self.lower is None else ("rows", "lower", "upper"), rows)
        self.leaves = self._cut(tensor_of(rows))

    def _cut(self, rows: Tensor) -> list[Any]:
        return [
            leaf.index_select(0, rows.to(leaf.device)) if is_cut else leaf
            for leaf, is_cut in zip(self.leaves, self.is_cut, strict=True)
        ]

    def evaluate(self, x: Array) -> tuple[Array, Array, Array]:
        """Values in float64, gradients, and their largest (projected) absolute entries; (K,), (K, n) and (K,)."""
        point = tensor_of(x)
        with torch.enable_grad():
            leaf, version = point.detach().requires_grad_(self.jac is None or self.keeps_graph), point._version
            value, given = self._values(leaf, self.leaves)
            grad = given if given is not None else gradients(value, leaf, f"{self.who}: fun", self.keeps_graph)
        if point._version != version:
            raise RuntimeError(f"{self.who}: fun or jac changed its argument in place. Let it work on a copy.")
        if self.keeps_graph:
            self.graphs = [*self.graphs[-1:], Graph(self.rows, grad, leaf)]
        residual = slope = array_of(grad.detach().clone(memory_format=torch.contiguous_format))
        if self.lower is not None:
            xp: Any = library(x)
            # x - clamp(x - grad), without rounding x - grad.
            residual = xp.maximum(xp.minimum(slope, x - self.lower), x - self.upper)
        return array_of(value.detach().clone().double()), slope, largest_entries(residual)

    def _values(self, x: Tensor, leaves: list[Any]) -> tuple[Tensor, Tensor | None]:
        """Values, and gradients if they are given; NaN for problems that are outside of the function's domain."""
        try:
            return self._call(x, leaves)
        except self.walls as error:
            if isinstance(error, NEVER):
                raise
            if len(x) == 1:
                return self._outside(x), None if self.jac is None else torch.full_like(x, math.nan)
        middle, parts = len(x) // 2, []  # halves, until these problems are alone
        for start, end in ((0, middle), (middle, len(x))):
            some = [leaf[start:end] if is_cut else leaf for leaf, is_cut in zip(leaves, self.is_cut, strict=True)]
            parts.append(self._values(x[start:end], some))
        values, grads = zip(*parts, strict=True)
        return self._joined(values), None if self.jac is None else torch.cat(grads)

    def _outside(self, x: Tensor) -> Tensor:
        """What is returned for one problem outside of the function's domain."""
        return x.sum(1) * math.nan

    def _joined(self, parts: tuple[Tensor, ...]) -> Tensor:
        """What is returned for parts of the batch, together."""
        return torch.cat(parts)

    def _compared(self, returned: Any, count: int) -> Tensor:
        """What must not depend on the other problems, (K,), from what the function returned."""
        return values(returned[0] if self.jac is True else returned, count, f"{self.who}: {self.name}")

    def _call(self, x: Tensor, leaves: list[Any]) -> tuple[Tensor, Tensor | None]:
        self.n_calls += 1
        arguments = self.structure.unflatten(x), *pytree.tree_unflatten(leaves, self.spec)
        value, grad = self.fun(*arguments), None
        if self.jac is True:
            if not (isinstance(value, tuple | list) and len(value) == 2):
                raise TypeError(f"{self.who}: with jac=True fun must return (values, gradients), got {value!r}.")
            value, grad = value
        elif self.jac is not None:
            grad = self.jac(*arguments)
        value = values(value, len(x), f"{self.who}: fun")
        if self.jac is None:
            return value, None
        grad = self.structure.like(grad, len(x), f"{self.who}: the gradient from jac")
        if self.keeps_graph and not grad.requires_grad:
            raise RuntimeError(
                f"{self.who}: autograd cannot see how the gradient from jac depends on x. Compute jac with torch "
                "operations, or use method='l-bfgs'."
            )
        return value, grad

    def hessians(self, rows: Array, age: int) -> Array:
        """Symmetric Hessians (k, n, n) of some problems at their last (age 1) or last but one (age 2) evaluation.

        One backward pass for each variable, for all problems that were evaluated then.
        """
        graph = self.graphs[-age]
        places = torch.searchsorted(tensor_of(graph.rows), tensor_of(take(self.rows, rows)))
        numel = graph.leaf.shape[1]
        hessians = graph.leaf.new_zeros(len(places), numel, numel)
        if graph.grad.requires_grad:  # else the functions are linear
            for column in range(numel):
                try:
                    with torch.enable_grad():
                        slope = graph.grad[:, column].sum()
                    (product,) = torch.autograd.grad(slope, graph.leaf, retain_graph=True, allow_unused=True)
                except RuntimeError as error:
                    raise RuntimeError(
                        f"{self.who}: fun cannot be differentiated twice ({error}). Use method='l-bfgs'."
                    ) from error
                if product is not None:
                    hessians[:, column] = product[places]
        return array_of((hessians + hessians.mT) / 2)

    def check_independence(self, x: Array, value: Array) -> None:
        """Raise ``ValueError`` unless every other problem, in reverse order, has the same values by itself."""
        start, before = tensor_of(x), tensor_of(value)
        some = torch.arange(len(start) - 1, -1, -2, device=start.device)
        if len(some) == len(start):
            return
        self.n_calls += 1
        arguments = self.structure.unflatten(start[some]), *pytree.tree_unflatten(self._cut(some), self.spec)
        try:
            alone = self.fun(*arguments)
        except self.walls:
            return
        except Exception as error:
            raise ValueError(
                f"{self.who}: {self.name} took {len(start)} problems, but not {len(some)} of them: {error}. Problems "
                f"that have finished leave the batch. {ALONE}."
            ) from error
        alone = self._compared(alone, len(some)).double()
        before = before[some].to(alone.device)
        scale = torch.maximum(before.abs(), alone.abs())
        differs = (alone - before).abs() > math.sqrt(self.eps) * (scale + scale.nanmedian())
        differs |= alone.isfinite() != before.isfinite()
        if differs.any():
            first = int(differs.long().argmax())
            raise ValueError(
                f"{self.who}: {self.name} must not mix the problems of a batch, and must return the same values again: "
                f"at x0, problem {int(some[first])} has the value {float(before[first]):.9g} among {len(start)} "
                f"problems, and {float(alone[first]):.9g} among {len(some)} in another order. {ALONE}."
            )


def values(value: Any, count: int, who: str) -> Tensor:
    """The values of a function; an error unless they are a real tensor of shape (K,)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{who} must return a tensor with a value for each problem, got {type(value).__name__}.")
    if value.shape != (count,) or not value.is_floating_point():
        raise ValueError(
            f"{who} must return a real tensor of shape ({count},), a value for each problem, got shape "
            f"{tuple(value.shape)} and {value.dtype}; reduce every dimension but the first."
        )
    return value


def gradients(value: Tensor, leaf: Tensor, who: str, create_graph: bool) -> Tensor:
    """The gradients (K, n) of K values; an error if they do not depend on the leaf."""
    if value.requires_grad:
        # Of a sum, because torch imports a lot before it takes gradients of a vector for the first time.
        (grad,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True, create_graph=create_graph)
        if grad is not None:
            return grad
    if not bool(value.isfinite().any()):  # constants that mark the end of the domain
        return torch.full_like(leaf, math.nan)
    raise RuntimeError(
        f"{who} returned values that do not depend on its argument as far as autograd can see: compute them with "
        "torch operations, without detach(), item() or no_grad(), or give their gradients as jac=."
    )
