"""Gauss-Newton steps in trust regions for many small problems at once: those of ``gauss_newton.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from descend.second_order.mathematics.gauss_newton import damped, damping_for


class BatchedGaussNewton:
    """Models |r + J s|^2 / 2 of K problems with dense Jacobians of any rank, and their minimizers over |D s| <= radius.

    Steps are in units of their own: t = D s / unit, with the largest residual of a problem as its unit.

    Args:
        n_rows: residuals of a problem.
        like: a tensor (K, n) in the precision of the Jacobians.
    Attributes:
        newton, newton_norm, newton_decrease: the shortest minimizers in all space (K, n), their lengths |D s| and by
            how much the models fall, (K,).
        unit: (K,).
    Source: Moré 1978, https://doi.org/10.1007/BFb0067700
    """

    _ARRAYS = ("values", "parts", "rows", "scale", "unit", "newton", "newton_norm", "newton_decrease")

    def __init__(self, n_rows: int, like: Tensor) -> None:
        count, n_columns = like.shape
        rank = min(n_rows, n_columns)
        self.rounding = max(n_rows, n_columns) * torch.finfo(like.dtype).eps
        double = like.double()
        self.values, self.parts = (double.new_zeros(count, rank) for _ in range(2))  # of the scaled Jacobians
        self.rows = double.new_zeros(count, rank, n_columns)
        self.scale, self.newton = torch.ones_like(double), torch.zeros_like(double)
        self.unit = double.new_ones(count)
        self.newton_norm, self.newton_decrease = (double.new_zeros(count) for _ in range(2))

    def renew(self, places: Tensor, jacobians: Tensor, residuals: Tensor, scale: Tensor) -> None:
        """Replace the models at some places (k,); (k, M, n), (k, M) and D (k, n), all finite."""
        largest = torch.linalg.vector_norm(residuals, torch.inf, 1) if residuals.shape[1] else residuals.sum(1)
        unit = torch.where(largest > 0, largest, 1.0)
        both = torch.cat([jacobians / scale.unsqueeze(1), (residuals / unit.unsqueeze(1)).unsqueeze(2)], 2)
        triangles = torch.linalg.qr(both, mode="r")[1].double()
        left, values, rows = torch.linalg.svd(triangles[:, :, :-1], full_matrices=False)
        self.values[places] = torch.where(values > self.rounding * values[:, :1], values, 0.0)
        self.parts[places] = (left.mT @ triangles[:, :, -1:]).squeeze(2)
        self.rows[places], self.scale[places], self.unit[places] = rows, scale.double(), unit.double()
        newton = damped(self.values, self.parts, 0.0)[places].unsqueeze(1) @ rows
        self.newton[places] = newton.squeeze(1)
        self.newton_norm, self.newton_decrease = self.measure(self.newton)

    def keep(self, rows: Tensor) -> None:
        """Leave out all models but these."""
        for name in self._ARRAYS:
            setattr(self, name, getattr(self, name).index_select(0, rows))

    def lengths(self, vectors: Tensor) -> Tensor:
        """|D s| of vectors (K, n)."""
        lengths: Tensor = torch.linalg.vector_norm(vectors.double() * self.scale, dim=1)
        return lengths

    def to_steps(self, t: Tensor) -> Tensor:
        """s from t."""
        return t * self.unit.unsqueeze(1) / self.scale

    def from_steps(self, steps: Tensor) -> Tensor:
        """t from s."""
        return steps.double() * self.scale / self.unit.unsqueeze(1)

    def measure(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """|D s|, and by how much the models fall, of any t."""
        along = self.values * (self.rows @ t.unsqueeze(2)).squeeze(2)
        decrease = -(along * (self.parts + 0.5 * along)).sum(1) * self.unit.square()
        return torch.linalg.vector_norm(t, dim=1) * self.unit, decrease

    def minimizers(self, radius: Tensor) -> tuple[Tensor, Tensor]:
        """t of the minimizers over |D s| <= radius, and whether they are on the boundary."""
        on_boundary = ~(self.newton_norm <= radius)
        t, some = self.newton.clone(), on_boundary.nonzero().squeeze(1)
        if len(some):
            values, parts = self.values[some], self.parts[some]
            damping = damping_for(values, parts, radius[some] / self.unit[some])
            t[some] = (damped(values, parts, damping.unsqueeze(1)).unsqueeze(1) @ self.rows[some]).squeeze(1)
        return t, on_boundary
