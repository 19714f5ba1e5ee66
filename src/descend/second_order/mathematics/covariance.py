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
        values: singular values of J D^-1, shape (..., K); zero beyond the rank. Leading dimensions count problems.
        rows: right singular vectors, shape (..., K, N).
        scale: the diagonal of D, shape (..., N).
        variance: of one residual; a number, or of shape (..., 1, 1).
    Returns:
        Shape (..., N, N).
    """
    is_part = (values > 0).unsqueeze(-1)
    roots = torch.where(is_part, rows / values.unsqueeze(-1), 0.0) / scale.unsqueeze(-2)
    is_free = 1 - torch.where(is_part, rows, 0.0).square().sum(-2) > UNDETERMINED
    is_unknown = is_free.unsqueeze(-1) | is_free.unsqueeze(-2)
    matrix = (variance * (roots.mT @ roots)).masked_fill(is_unknown, torch.nan)
    return torch.where(torch.diag_embed(is_free), torch.inf, matrix)
