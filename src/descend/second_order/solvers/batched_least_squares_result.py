"""What a fit of many models returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from descend.second_order.mathematics.gauss_newton import DenseGaussNewton, column_norms
from descend.second_order.solvers.batched_result import BatchedResult, best_index
from descend.second_order.solvers.least_squares_result import FIT_MESSAGES, LeastSquaresResult
from descend.second_order.solvers.result import X


@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class BatchedLeastSquaresResult(BatchedResult[X]):
    """What ``least_squares(..., batched=True)`` returns. ``result[i]`` is the i-th ``LeastSquaresResult``.

    Attributes:
        fun: costs, float64, shape (B,).
        residuals: at ``x``, as the function returned them, first dimension B.
        n_eval: evaluations of each problem's residuals, (B,); each with the Jacobian.
        jac: the Jacobians at ``x``, shape (B, M, n), of all residuals and variables flattened, their rows multiplied
            for the loss as in ``grad``; a complex number counts as two real ones.
    """

    residuals: Any
    jac: Tensor
    _rows: Tensor  # residuals multiplied for the loss
    _unflatten: Callable[[Tensor], Any]

    @property
    def message(self) -> list[str]:
        """The statuses in words, with advice."""
        return [FIT_MESSAGES[status] for status in self.status]

    @cached_property
    def rank(self) -> Tensor:
        """Of the Jacobians, scaled by the norms of their columns, int64, (B,); -1 where one is not finite."""
        ranks = [-1 if one.rank is None else one.rank for one in self]
        return torch.tensor(ranks, dtype=torch.int64, device=self.fun.device)

    @cached_property
    def covariance(self) -> Tensor:
        """Those of single results, shape (B, n, n); NaN where a Jacobian is not finite."""
        missing = self.jac.new_full((self.jac.shape[2],) * 2, torch.nan)
        found = [missing if one.covariance is None else one.covariance for one in self]
        return torch.stack([missing, *found])[1:]

    def __iter__(self) -> Iterator[LeastSquaresResult[X]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> LeastSquaresResult[X]:
        """The result of one problem. ``time`` is that of all."""
        given = vars(super().__getitem__(i)) | {"message": self.message[i]}
        jacobian, norms = self.jac[i], column_norms(self.jac[i])
        model = None
        if bool(norms.isfinite().all()) and bool(self._rows[i].isfinite().all()):
            model = DenseGaussNewton(jacobian, self._rows[i], torch.where(norms > 0, norms, 1.0))
        return LeastSquaresResult(
            **given,
            residuals=pytree.tree_map(lambda leaf: leaf[i], self.residuals),
            n_jac=given["n_eval"],
            jac=None if model is None else jacobian,
            _model=model,
            _unflatten=self._unflatten,
        )


@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class BestFit(LeastSquaresResult[X]):
    """What ``least_squares(..., batched="best")`` returns: the best ``LeastSquaresResult`` of several starts.

    Attributes:
        starts: the results from all of them.
    """

    starts: BatchedLeastSquaresResult[X]


def best_fit(starts: BatchedLeastSquaresResult[X], who: str) -> BestFit[X]:
    """The result with the lowest cost, chosen as by ``best_of``."""
    return BestFit(**vars(starts[best_index(starts, who)]), starts=starts)
