"""What a solver of many problems returns."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from descend.second_order.mathematics.arrays import tensor_of
from descend.second_order.solvers.batched_run import Iterations
from descend.second_order.solvers.result import MESSAGES, Iteration, Result, Status, X

FAILED = (Status.line_search_failed, Status.non_finite, Status.unbounded)
EQUAL = 1e-12  # relative difference of values that are equal to rounding


@dataclass(frozen=True, repr=False, eq=False)
class BatchedResult(Generic[X]):
    """What ``minimize(..., batched=True)`` returns: the results of B problems. ``result[i]`` is the i-th ``Result``.

    Attributes:
        x: the best points seen; same structure as ``x0``, first dimension B.
        fun: values there, float64, shape (B,).
        grad: gradients there; same structure as ``x``.
        status: why each problem stopped, a list.
        grad_norm: largest absolute entries of the (projected) gradients there, (B,).
        n_iter: iterations of each problem, (B,).
        n_eval: evaluations of each problem with its gradient, (B,).
        n_hvp: products with the Hessian of each problem; a dense one counts as n; (B,).
        n_calls: calls of ``fun``.
        time: seconds.
        n_negative_curvature: iterations of Newton's method that followed a direction of negative curvature, (B,).
        rounds: the iterations of each round, from which ``result[i].history`` is made.
    """

    x: X
    fun: Tensor
    grad: Any
    status: list[Status]
    grad_norm: Tensor
    n_iter: Tensor
    n_eval: Tensor
    n_hvp: Tensor
    n_calls: int
    time: float
    n_negative_curvature: Tensor
    rounds: list[Iterations]

    @property
    def success(self) -> Tensor:
        """Which problems met the tolerance, bool, (B,)."""
        success = [status is Status.converged for status in self.status]
        return torch.tensor(success, dtype=torch.bool, device=self.fun.device)

    @property
    def message(self) -> list[str]:
        """The statuses in words, with advice."""
        return [MESSAGES[status] for status in self.status]

    def __len__(self) -> int:
        return len(self.status)

    def __iter__(self) -> Iterator[Result[X]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Result[X]:
        """The result of one problem. ``time`` is that of all."""
        try:
            i = operator.index(i)
        except TypeError as error:
            raise TypeError(
                f"{type(self).__name__}: the index must be an integer, got {i!r}. Slice x, fun and the others instead."
            ) from error
        if not -len(self) <= i < len(self):
            raise IndexError(f"BatchedResult: there are {len(self)} problems, got index {i}.")
        i %= len(self)
        return Result(
            x=pytree.tree_map(lambda leaf: leaf[i], self.x),
            fun=float(self.fun[i]),
            grad=pytree.tree_map(lambda leaf: leaf[i], self.grad),
            status=self.status[i],
            message=MESSAGES[self.status[i]],
            grad_norm=float(self.grad_norm[i]),
            n_iter=int(self.n_iter[i]),
            n_eval=int(self.n_eval[i]),
            n_hvp=int(self.n_hvp[i]),
            time=self.time,
            history=self._histories[i],
            n_negative_curvature=int(self.n_negative_curvature[i]),
        )

    @cached_property
    def _histories(self) -> list[list[Iteration]]:
        histories: list[list[Iteration]] = [[] for _ in range(len(self))]
        for entry in self.rounds:
            rows, is_new, *numbers = (tensor_of(array).cpu().numpy() for array in entry)
            new = np.flatnonzero(is_new)
            for row, *entries in zip(rows[new].tolist(), *(array[new].tolist() for array in numbers), strict=True):
                histories[row].append(Iteration(*entries))
        return histories

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {status}" for status, count in Counter(map(str, self.status)).most_common())
        name, calls = type(self).__name__, f"n_calls={self.n_calls}, time={self.time:.3g} s"
        return f"{name}({len(self)} problems: {counts or 'none'}; {calls})"


@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class BestResult(Result[X]):
    """What ``minimize(..., batched="best")`` returns: the best ``Result`` of several starts.

    Attributes:
        starts: the results from all of them.
    """

    starts: BatchedResult[X]


def best_of(starts: BatchedResult[X], who: str) -> BestResult[X]:
    """The result that ``best_index`` chooses."""
    return BestResult(**vars(starts[best_index(starts, who)]), starts=starts)


def best_index(starts: BatchedResult[X], who: str) -> int:
    """The position of the result with the lowest finite value.

    Starts from which the solver failed (as where the function falls without end) count only if it failed from all. Of
    values that are equal to rounding, one that converged is better.

    Raises:
        ValueError: if there is no start.
    """
    if not len(starts):
        raise ValueError(f"{who}: batched='best' needs at least one start, got x0 with a first dimension of 0.")
    values = [value if math.isfinite(value) else math.inf for value in starts.fun.tolist()]
    has_failed = [status in FAILED or value == math.inf for status, value in zip(starts.status, values, strict=True)]
    some = [i for i in range(len(starts)) if not has_failed[i] or all(has_failed)]
    lowest = min(values[i] for i in some)
    equal = [i for i in some if values[i] <= lowest + EQUAL * abs(lowest)]
    return min(equal, key=lambda i: (starts.status[i] is not Status.converged, values[i]))
