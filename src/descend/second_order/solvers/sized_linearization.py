"""Linear models with a dense Jacobian where that is fast, else from products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

from torch import Tensor

from descend.second_order.mathematics.gauss_newton import LinearModel
from descend.second_order.problem.objective import free_memory
from descend.second_order.problem.residuals import DENSE_COPIES, ResidualObjective, ResidualPoint
from descend.second_order.solvers.dense_linearization import DenseLinearization
from descend.second_order.solvers.product_linearization import ProductLinearization

MAX_DENSE = 2e9  # multiplications in the factorization of a dense Jacobian


class SizedLinearization:
    """Chooses when the number of residuals is known, at the first point.

    Args:
        objective, tol, norms: as in ``ProductLinearization``.
    """

    def __init__(self, objective: ResidualObjective, tol: float, norms: Tensor | None = None) -> None:
        self.objective, self.tol, self._norms = objective, tol, norms
        self.chosen: DenseLinearization | ProductLinearization | None = None

    @property
    def norms(self) -> Tensor | None:
        """Of the columns of the Jacobian; None before the first model."""
        return self._norms if self.chosen is None else self.chosen.norms

    def model(self, point: ResidualPoint) -> LinearModel | None:
        """The model around a point; None if derivatives are not finite there."""
        if self.chosen is None:
            make = dense_linearization if is_dense_fast(point) else ProductLinearization
            self.chosen = make(self.objective, self.tol, self._norms)
        return self.chosen.model(point)


def dense_linearization(objective: ResidualObjective, tol: float, norms: Tensor | None = None) -> DenseLinearization:
    """One that needs no tolerance."""
    return DenseLinearization(objective, norms)


def is_dense_fast(point: ResidualPoint) -> bool:
    """Whether a dense Jacobian fits into memory and is factorized in seconds."""
    n_rows, n_columns = len(point.residuals), point.x.numel()
    needed = DENSE_COPIES * n_rows * n_columns * point.x.element_size()
    return n_rows * n_columns * min(n_rows, n_columns) <= MAX_DENSE and needed <= free_memory(point.x.device)


JacobianKind: TypeAlias = Literal["auto", "dense", "products"]
Kind: TypeAlias = DenseLinearization | ProductLinearization | SizedLinearization
LINEARIZATIONS: dict[str, Callable[[ResidualObjective, float, Tensor | None], Kind]] = {
    "auto": SizedLinearization,
    "dense": dense_linearization,
    "products": ProductLinearization,
}
