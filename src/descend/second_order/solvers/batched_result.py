"""What a solver of many problems returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor

from descend.second_order.mathematics.arrays import tensor_of
from descend.second_order.solvers.batched_run import Iterations
from descend.second_order.solvers.result import MESSAGES, Iteration, Result, Status, X

FAILED = (Status.line_search_failed, Status.non_finite)


@dataclass(frozen=True, repr=False)
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
        n_hvp: products of each problem's Hessian, (B,).
        n_calls: calls of ``fun``.
        time: seconds.
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
    _rounds: list[Iterations] = field(compare=False)
    _row_of: Callable[[Any, int], Any] = field(compare=False)

    @property
    def success(self) -> Tensor:
        """Which problems met the tolerance, bool, (B,)."""
        return torch.tensor([status is Status.converged for status in self.status], dtype=torch.bool)

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
        if not -len(self) <= i < len(self):
            raise IndexError(f"BatchedResult: there are {len(self)} problems, got index {i}.")
        i %= len(self)
        return Result(**self.fields_of(i))

    def fields_of(self, i: int) -> dict[str, Any]:
        """The attributes of the i-th ``Result``."""
        return dict(
            x=self._row_of(self.x, i),
            fun=float(self.fun[i]),
            grad=self._row_of(self.grad, i),
            status=self.status[i],
            message=MESSAGES[self.status[i]],
            grad_norm=float(self.grad_norm[i]),
            n_iter=int(self.n_iter[i]),
            n_eval=int(self.n_eval[i]),
            n_hvp=int(self.n_hvp[i]),
            time=self.time,
            history=self._histories[i],
        )

    @cached_property
    def _histories(self) -> list[list[Iteration]]:
        histories: list[list[Iteration]] = [[] for _ in range(len(self))]
        for entry in self._rounds:
            rows, is_new, *numbers = (tensor_of(array).cpu().numpy() for array in entry)
            new = np.flatnonzero(is_new)
            for row, value, norm, step, n_eval in zip(
                rows[new].tolist(), *(array[new].tolist() for array in numbers), strict=True
            ):
                histories[row].append(Iteration(value, norm, step, n_eval, 0))
        return histories

    def best(self) -> int:
        """The problem with the best result.

        That is the lowest finite ``fun`` among the problems whose solver did not fail (``line_search_failed`` and
        ``non_finite``, as where a function falls without end), or among all if each failed. Of values that are equal to
        rounding, one that converged is better.

        Raises:
            ValueError: if there is no problem.
        """
        if not len(self):
            raise ValueError("BatchedResult: there is no best of 0 problems.")
        values = [value if value == value else float("inf") for value in self.fun.tolist()]
        going = [status not in FAILED and abs(value) < float("inf") for status, value in zip(self.status, values)]
        some = [i for i in range(len(self)) if going[i] or not any(going)]
        lowest = min(values[i] for i in some)
        noise = 10 * torch.finfo(torch.float64).eps * abs(lowest)
        return min(
            (i for i in some if values[i] <= lowest + noise), key=lambda i: (self.status[i] is not Status.converged, values[i])
        )

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {status}" for status, count in Counter(map(str, self.status)).most_common())
        return f"BatchedResult({len(self)} problems: {counts or 'none'}; n_calls={self.n_calls}, time={self.time:.3g} s)"


@dataclass(frozen=True, repr=False)
class BestResult(Result[X]):
    """What ``minimize(..., batched="best")`` returns: the best of several starts.

    Attributes:
        starts: the results from all of them.
    """

    starts: BatchedResult[X] | None = None
