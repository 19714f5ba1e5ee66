"""What a Gauss-Newton model leaves out of the Hessian, learned from changes of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from descend.second_order.mathematics.spectrum import inner, times

LEAST_SLOPE = 1e-12  # cosine of the step and the change of the gradient from which there is something to learn


def secant_update(curvature: Tensor, step: Tensor, change: Tensor, structured: Tensor) -> Tensor:
    """The symmetric S closest to the sized old one with S s = ``structured``, in a norm with which ``change`` = H s.

    Args:
        curvature: the old S, shape (..., N, N); leading dimensions count problems.
        step: s, shape (..., N).
        change: y, of the gradient along s.
        structured: the part of y that S is to explain: (J_new - J_old)'r_new.
    Returns:
        The new S; the old one where the gradient has not grown along the step.
    Source: Dennis, Gay & Welsch 1981, sections 3 and 4 (the factor 3.6), https://doi.org/10.1145/355958.355965
    """
    curved = times(curvature, step)
    slope, old, wanted = (inner(step, vector) for vector in (change, curved, structured))
    sizes = torch.linalg.vector_norm(step, dim=-1) * torch.linalg.vector_norm(change, dim=-1)
    size = torch.where(old != 0, (wanted / old).abs().clamp(max=1.0), 1.0).unsqueeze(-1)
    missing = structured - size * curved
    unit = change / slope.unsqueeze(-1)
    half = missing.unsqueeze(-1) * unit.unsqueeze(-2)
    twice = inner(missing, step)[..., None, None] * (unit.unsqueeze(-1) * unit.unsqueeze(-2))
    updated = size.unsqueeze(-1) * curvature + half + half.mT - twice
    updated = torch.where(updated.isfinite().all(-1).all(-1)[..., None, None], updated, 0.0)
    return torch.where((slope > LEAST_SLOPE * sizes)[..., None, None], updated, curvature)
