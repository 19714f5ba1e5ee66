"""Linear models of residuals from products with their Jacobian: least squares without a matrix."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from descend.second_order.mathematics.lsmr import Product
from descend.second_order.mathematics.product_gauss_newton import ProductGaussNewton
from descend.second_order.problem.residuals import ResidualObjective, ResidualPoint
from descend.second_order.solvers.least_squares_run import is_within

FIRST_PROBES, PROBES = 8, 2  # products with random signs that estimate the norms of the columns, at first and later
NEWEST = 0.2  # share of later probes in the estimate
LOOSEST, TIGHTEST = 0.1, 1e-4  # reduction of the model's slope, far from the solution and to confirm convergence
MAX_LSMR, MAX_CONFIRMING = 200, 2000  # iterations for the same


class ProductLinearization:
    """Models in O(M + N) memory; see ``ProductGaussNewton``.

    The norms of the Jacobian's columns, in which steps do not depend on the units of the variables, are estimated by
    products J'u with random signs u: the square of an entry has the column's squared norm as its mean.

    Args:
        objective: gives the products.
        tol: of the run. A Newton step that would meet it is solved for more exactly first.
        norms: what a run before has estimated; None without one.
    Attributes:
        norms: estimates of the norms of the columns; None before the first model.
        first_slope: largest |D^-1 J'r| so far; None before.
    Source: the estimate: Bekas, Kokiopoulou & Saad 2007, https://doi.org/10.1016/j.apnum.2007.01.003; how exactly
        models are minimized: Nocedal & Wright 2006, section 7.1.
    """

    def __init__(self, objective: ResidualObjective, tol: float, norms: Tensor | None = None) -> None:
        self.objective, self.tol, self.norms = objective, tol, norms
        self.first_slope: float | None = None
        self._random = torch.Generator().manual_seed(0)

    def model(self, point: ResidualPoint) -> ProductGaussNewton | None:
        """The model around a point; None if products are not finite there."""
        objective = self.objective
        residuals, factors = objective.rows_of(point)
        multiply, multiply_transposed = objective.products(point)
        if factors is not None:
            multiply, multiply_transposed = _with_factors(multiply, multiply_transposed, factors)
        self._learn_norms(multiply_transposed, residuals)
        assert self.norms is not None
        scale = torch.where(self.norms > 0, self.norms, 1.0)
        grad = multiply_transposed(residuals)
        slope = float(torch.linalg.vector_norm(grad / scale, dtype=torch.float64))
        if not math.isfinite(slope):
            return None
        self.first_slope = max(slope, self.first_slope or 0.0)
        reduction = min(LOOSEST, math.sqrt(slope / self.first_slope)) if slope else LOOSEST
        low = high = None
        if objective.lower is not None and objective.upper is not None:
            low, high = objective.lower - point.x, objective.upper - point.x
        make = partial(ProductGaussNewton, multiply, multiply_transposed, residuals, grad, scale, low, high)
        model = make(reduction=reduction, max_lsmr=MAX_LSMR)
        if model.is_usable and is_within(self.tol, model, point, objective.eps):
            model = make(reduction=TIGHTEST, max_lsmr=MAX_CONFIRMING)
        return model if model.is_usable else None

    def _learn_norms(self, multiply_transposed: Product, residuals: Tensor) -> None:
        number = FIRST_PROBES if self.norms is None else PROBES
        probes = [multiply_transposed(self._signs(residuals)).square() for _ in range(number)]
        newest = torch.nan_to_num(torch.stack(probes).mean(0), nan=0.0, posinf=0.0)
        if self.norms is not None:
            newest = torch.where(self.norms > 0, NEWEST * newest + (1 - NEWEST) * self.norms.square(), newest)
        self.norms = newest.sqrt()

    def _signs(self, like: Tensor) -> Tensor:
        """1 or -1 for each entry."""
        bits = torch.randint(0, 2, like.shape, generator=self._random, dtype=torch.int8)
        return (2 * bits - 1).to(like)


def _with_factors(multiply: Product, multiply_transposed: Product, factors: Tensor) -> tuple[Product, Product]:
    """The products with rows multiplied by factors."""
    return lambda v: factors * multiply(v), lambda u: multiply_transposed(factors * u)
