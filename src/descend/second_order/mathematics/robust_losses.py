"""Robust losses: cost = scale^2 / 2 * sum(rho((r / scale)^2)), and its Gauss-Newton model in scaled rows.

A loss maps z = (r / scale)^2 to rho(z), rho'(z) and rho''(z). Those below are SciPy's, with rho(0) = 0 and rho'(0) = 1.

Source: Triggs et al. 2000, section 4.3, https://doi.org/10.1007/3-540-44480-7_21, for the scaled rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Rho: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]

LEAST_CURVATURE = 0.1  # of a row, as a fraction of rho'; the second derivative of a concave rho may be negative


def huber(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z up to 1, then 2 sqrt(z) - 1: Huber 1964, https://doi.org/10.1214/aoms/1177703732."""
    root = torch.clamp(z, min=1.0).sqrt()
    return torch.where(z <= 1, z, 2 * root - 1), 1 / root, torch.where(z <= 1, 0.0, -0.5 / root**3)


def soft_l1(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """2 (sqrt(1 + z) - 1), a smooth absolute value: Charbonnier et al. 1997, https://doi.org/10.1109/83.551699."""
    root = (1 + z).sqrt()
    return 2 * z / (1 + root), 1 / root, -0.5 / root**3


def cauchy(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log(1 + z): the negative log-likelihood of Cauchy's distribution."""
    inverse = 1 / (1 + z)
    return torch.log1p(z), inverse, -inverse.square()


def arctan(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """arctan(z), at most pi / 2 for one residual."""
    inverse = 1 / (1 + z.square())
    return torch.arctan(z), inverse, -2 * z * inverse.square()


LOSSES: dict[str, Rho | None] = {
    "linear": None,
    "huber": huber,
    "soft_l1": soft_l1,
    "cauchy": cauchy,
    "arctan": arctan,
}


def cost(residuals: Tensor, rho: Rho | None, scale: float) -> Tensor:
    """scale^2 / 2 * sum(rho((r / scale)^2)) over the last dimension; None is the identity, whatever the scale."""
    if rho is None:
        return 0.5 * residuals.square().sum(-1)
    return 0.5 * scale**2 * rho((residuals / scale).square())[0].sum(-1)


def scaled_rows(residuals: Tensor, rho: Rho, scale: float) -> tuple[Tensor, Tensor]:
    """Residuals and factors for the rows of the Jacobian whose linear least squares model the robust cost.

    With f = factors, J the Jacobian and r the new residuals, (f J)'r is the gradient of the cost. (f J)'(f J) is its
    Gauss-Newton Hessian, where a row's curvature rho' + 2 z rho'' is raised to ``LEAST_CURVATURE`` times rho'. SciPy
    raises it to the rounding error, so that the residuals of outliers are multiplied by up to 1e8.
    """
    z = (residuals / scale).square()
    _, first, second = rho(z)
    curvature = torch.maximum(first + 2 * z * second, LEAST_CURVATURE * first)
    factors = torch.clamp(curvature, min=torch.finfo(residuals.dtype).tiny).sqrt()
    return residuals * (first / factors), factors
