"""Gauss-Newton steps in trust regions for many small problems at once: those of ``gauss_newton.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from descend.second_order.mathematics.spectrum import (
    LEAST_EIGENVALUE,
    curved_spectrum,
    damped,
    damping_for,
    fall,
    resolved,
    spectrum_of,
    times,
    triangle_of,
)


class BatchedGaussNewton:
    """Models |r + J s|^2 / 2 of K problems with dense Jacobians of any rank, and their minimizers over |D s| <= radius.

    Steps are in the units of ``spectrum.py``. A decomposition into singular values costs ten times a triangle, so that
    only those models get one whose steps are limited by the radius, or whose rank may not be full.

    Args:
        n_rows: residuals of a problem.
        like: a tensor (K, n) in the precision of the Jacobians.
        holds: whether variables may be held.
    Attributes:
        newton, newton_norm, newton_decrease: the shortest minimizers in all space (K, n), their lengths |D s| and by
            how much the models fall, (K,).
        scale: the diagonals of D, (K, n).
        damping: of the last steps, (K,).
        unit: (K,).
    Source: Moré 1978, https://doi.org/10.1007/BFb0067700
    """

    _ARRAYS = (
        *("matrix", "right", "inverse", "has_spectrum", "values", "parts", "rows"),
        *("scale", "unit", "held", "damping", "newton", "newton_norm", "newton_decrease"),
    )

    def __init__(self, n_rows: int, like: Tensor, *, holds: bool = False) -> None:
        count, n_columns = like.shape
        rank = n_columns if holds else min(n_rows, n_columns)
        self.rounding = max(n_rows, n_columns) * torch.finfo(like.dtype).eps
        double = like.double()
        self.matrix, self.rows = (double.new_zeros(count, rank, n_columns) for _ in range(2))
        self.right, self.values, self.parts = (double.new_zeros(count, rank) for _ in range(3))
        self.inverse = double.new_zeros(count, n_columns, n_columns)  # of ``matrix``, if it is sound
        self.scale, self.newton = torch.ones_like(double), torch.zeros_like(double)
        self.held = torch.zeros_like(like, dtype=torch.bool)
        self.has_spectrum = self.held.new_zeros(count)
        self.unit = double.new_ones(count)
        self.damping, self.newton_norm, self.newton_decrease = (double.new_zeros(count) for _ in range(3))

    def renew(
        self,
        places: Tensor,
        jacobians: Tensor,
        residuals: Tensor,
        scale: Tensor,
        curvatures: Tensor,
        is_curved: Tensor,
        held: Tensor | None = None,
    ) -> None:
        """Replace the models at some places (k,).

        Args:
            places: (k,).
            jacobians: J, (k, M, n), finite.
            residuals: r, (k, M), finite.
            scale: the diagonals of D, (k, n).
            curvatures: S, (k, n, n), float64; added to J'J, eigenvalues relative to J'J by their absolute values.
            is_curved: whether S is used, (k,).
            held: variables that do not move, (k, n).
        """
        scale = scale.double()
        matrix, right, unit = triangle_of(jacobians, residuals, scale.to(jacobians), held)
        n = matrix.shape[2]
        matrix, right = matrix[:, :n], right[:, :n]
        if held is not None:
            self.held[places] = held
            curvatures = curvatures.masked_fill(held.unsqueeze(1) | held.unsqueeze(2), 0.0)
        inverse, is_sound = self._inverses(matrix)
        some = (is_curved & is_sound).nonzero().squeeze(1)
        if len(some):
            curved, is_definite = self._curved(matrix[some], right[some], inverse[some], scale[some], curvatures[some])
            for old, new in zip((matrix, right, inverse), curved, strict=True):
                old[some[is_definite]] = new[is_definite]
            is_sound[some] = is_definite
        self.matrix[places], self.right[places], self.inverse[places] = matrix, right, inverse
        self.scale[places], self.unit[places], self.damping[places] = scale, unit.double(), 0.0
        self.newton[places] = -times(inverse, right) if matrix.shape[1] == n else 0.0
        self.has_spectrum[places] = ~is_sound
        others = (~is_sound).nonzero().squeeze(1)
        if len(others):
            at = places[others]
            spectrum = spectrum_of(matrix[others], right[others], self.rounding)
            bent = is_curved[others].nonzero().squeeze(1)
            if len(bent):
                plain, rows = type(spectrum)(*(array[bent] for array in spectrum)), others[bent]
                curved = curved_spectrum(plain, scale[rows], curvatures[rows], self.rounding)
                for old, new in zip(spectrum, curved, strict=True):
                    old[bent] = new
            self.values[at], self.parts[at], self.rows[at] = spectrum
            self.matrix[at], self.right[at] = spectrum.values.unsqueeze(2) * spectrum.rows, spectrum.parts
            self.newton[at] = times(spectrum.rows.mT, damped(spectrum.values, spectrum.parts, 0.0))
        self.newton_norm, self.newton_decrease = self.measure(self.newton)

    def _inverses(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Inverses of triangles, and where a bound on the condition says that the rank is full."""
        count, rank, n = matrix.shape
        if rank < n:
            return self.inverse.new_zeros(count, n, n), self.has_spectrum.new_zeros(count)
        unit = torch.eye(n, dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
        inverse = torch.linalg.solve_triangular(matrix, unit, upper=True)
        squares = (array.square().sum((1, 2)) for array in (matrix, inverse))
        return inverse, torch.stack([*squares]).sqrt().prod(0) < 1 / self.rounding

    def _curved(
        self, matrix: Tensor, right: Tensor, inverse: Tensor, scale: Tensor, curvature: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Triangles of R'R + S, right sides and inverses; and where S, relative to R'R, leaves it positive definite."""
        scaled = inverse / scale.unsqueeze(2)
        unit = torch.eye(matrix.shape[2], dtype=matrix.dtype, device=matrix.device)
        factor, info = torch.linalg.cholesky_ex(unit + scaled.mT @ curvature @ scaled)
        lower = torch.linalg.solve_triangular(factor, unit.expand_as(factor), upper=False)
        is_definite = (info == 0) & (lower.square().sum((1, 2)) < 1 / LEAST_EIGENVALUE)
        return (factor.mT @ matrix, times(lower, right), inverse @ lower.mT), is_definite

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
        decrease = fall(times(self.matrix, t), self.right, self.unit)
        return torch.linalg.vector_norm(t, dim=1) * self.unit, decrease

    def minimizers(self, radius: Tensor) -> tuple[Tensor, Tensor]:
        """t of the minimizers over |D s| <= radius, and whether they are on the boundary."""
        on_boundary = ~(self.newton_norm <= radius)
        t, some = self.newton.clone(), on_boundary.nonzero().squeeze(1)
        self.damping = torch.zeros_like(self.damping)
        if len(some):
            new = some[~self.has_spectrum[some]]
            if len(new):
                self.values[new], self.parts[new], self.rows[new] = spectrum_of(self.matrix[new], self.right[new], 0.0)
                self.has_spectrum[new] = True
            values, parts = self.values[some], self.parts[some]
            self.damping[some] = damping_for(values, parts, radius[some] / self.unit[some])
            t[some] = times(self.rows[some].mT, damped(values, parts, self.damping[some].unsqueeze(1)))
        return t, on_boundary

    def corrections(self, slopes: Tensor) -> Tensor:
        """-(H + damping D^2)^-1 J'b for J'b (K, n), with the dampings of the last steps."""
        slopes = (slopes.double() / self.scale).masked_fill(self.held, 0.0)
        t = -times(self.inverse, times(self.inverse.mT, slopes))
        some = self.has_spectrum.nonzero().squeeze(1)
        if len(some):
            rows, damping = self.rows[some], self.damping[some].unsqueeze(1)
            t[some] = times(rows.mT, resolved(self.values[some], times(rows, slopes[some]), damping))
        return t / self.scale
