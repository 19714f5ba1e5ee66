"""Covariance of fitted parameters, from the singular values of the Jacobian at the solution."""

from __future__ import annotations

import torch
from torch import Tensor

UNDETERMINED = 1e-10  # squared share of a variable in the null space from which the residuals do not determine it


def covariance(values: Tensor, rows: Tensor, scale: Tensor, variance: Tensor | float) -> Tensor:
    """``variance`` times (J'J)^-1, for the variables that the residuals determine.

    If J has not full rank, variables with a part in its null space have infinite variance, and NaN as covariance with
    any other. The others have theirs from the pseudo-inverse, which for them does not depend on the scale.

    Args:
        values: singular values of J D^-1, shape (K,); zero beyond the rank.
        rows: right singular vectors, shape (K, N).
        scale: the diagonal of D, shape (N,).
        variance: of one residual.
    Returns:
        Shape (N, N).
    """
    basis = rows[values > 0]
    roots = basis / values[values > 0].unsqueeze(1) / scale
    matrix = variance * (roots.T @ roots)
    is_free = 1 - basis.square().sum(0) > UNDETERMINED
    matrix[is_free] = torch.nan
    matrix[:, is_free] = torch.nan
    matrix.diagonal()[is_free] = torch.inf
    return matrix
