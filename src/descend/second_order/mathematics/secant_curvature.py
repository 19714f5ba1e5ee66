"""What a Gauss-Newton model leaves out of the Hessian, learned from changes of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_SLOPE = 1e-12  # cosine of the step and the change of the gradient from which there is something to learn


def secant_update(curvature: Tensor, step: Tensor, change: Tensor, structured: Tensor) -> Tensor:
    """The symmetric S closest to the sized old one with S s = ``structured``, in a norm with which ``change`` = H s.

    Args:
        curvature: the old S, shape (N, N).
        step: s, shape (N,).
        change: y, of the gradient along s.
        structured: the part of y that S is to explain: (J_new - J_old)'r_new.
    Returns:
        The new S; the old one where the gradient has not grown along the step.
    Source: Dennis, Gay & Welsch 1981, sections 3 and 4 (the factor 3.6), https://doi.org/10.1145/355958.355965
    """
    curved = curvature.mv(step)
    slope, old, wanted = (float(step.dot(vector)) for vector in (change, curved, structured))
    sizes = torch.linalg.vector_norm(step) * torch.linalg.vector_norm(change)
    if not slope > LEAST_SLOPE * float(sizes):
        return curvature
    size = min(1.0, abs(wanted / old)) if old else 1.0
    missing = structured - size * curved
    half = torch.outer(missing, change / slope)
    twice = float(missing.dot(step)) * torch.outer(change / slope, change / slope)
    updated = size * curvature + half + half.T - twice
    return updated if bool(updated.isfinite().all()) else torch.zeros_like(curvature)
