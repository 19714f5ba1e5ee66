"""Solve H w = v where H is symmetric and must be positive definite: by its Cholesky factor, or from products alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from descend.second_order.mathematics.space import length
from descend.second_order.mathematics.trust_region import End, steihaug

ROUNDING = 8  # a few units in the last place are noise

REASONS = {
    End.boundary: "singular",
    End.negative_curvature: "not positive definite",
    End.non_finite: "NaN or infinite",
}


class NotDefiniteError(ArithmeticError):
    """H is indefinite or singular to rounding, or conjugate gradients did not converge."""


def cholesky(hessians: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factors of many matrices, and which of them are positive definite.

    Args:
        hessians: H, shape (..., N, N), N >= 0.
        eps: rounding error of H, relative to the square root of the product of two diagonal entries.
    Returns:
        The factors, and a bool tensor of shape (...): False where the least eigenvalue is negative or within rounding
        of zero, after scaling to a diagonal of ones. The factor is the identity there.
    Example:
        >>> factors, is_definite = cholesky(torch.tensor([[[4.0, 2.0], [2.0, 5.0]], [[1.0, 2.0], [2.0, 1.0]]]), 1e-7)
        >>> factors[0], is_definite
        (tensor([[2., 0.],
                [1., 2.]]), tensor([ True, False]))
    """
    numel = hessians.shape[-1]
    diagonal = hessians.diagonal(dim1=-2, dim2=-1)
    is_definite = (diagonal > 0).all(-1) & hessians.isfinite().flatten(-2).all(-1)
    identity = torch.eye(numel, dtype=hessians.dtype, device=hessians.device)
    # Scaled, so that the test does not depend on the units of the variables. Pivots would not show all singular H.
    roots = torch.where(is_definite[..., None], diagonal, 1.0).sqrt()
    scaled = torch.where(is_definite[..., None, None], hessians / roots[..., None] / roots[..., None, :], identity)
    least = ROUNDING * math.sqrt(numel) * eps
    is_definite = is_definite & (torch.linalg.eigvalsh(scaled) > least).all(-1)
    factors, info = torch.linalg.cholesky_ex(torch.where(is_definite[..., None, None], scaled, identity))
    is_definite = is_definite & (info == 0)
    return torch.where(is_definite[..., None, None], factors * roots[..., None], identity), is_definite


def solve_by_factor(factors: Tensor, vectors: Tensor) -> Tensor:
    """w from the Cholesky factors of H and v, both of shape (..., N)."""
    solutions: Tensor = torch.cholesky_solve(vectors[..., None], factors)[..., 0]
    return solutions


def solve_by_products(
    product: Callable[[Tensor], Tensor], vector: Tensor, tolerance: float, max_products: int
) -> Tensor:
    """w by conjugate gradients.

    If H is singular, that is found only where v has a part along a direction without curvature.

    Args:
        product: u -> H u; must not change u.
        vector: v, shape (N,), finite.
        tolerance: most that the norm of v - H w may be, relative to that of v; > 0.
        max_products: most calls of ``product``, >= 1.
    Raises:
        NotDefiniteError: if a direction without positive curvature is met, or the tolerance not reached.
    Example:
        >>> solve_by_products(lambda u: torch.tensor([1.0, 4.0]) * u, torch.tensor([1.0, 1.0]), 1e-5, 10)
        tensor([1.0000, 0.2500])

    Source: Hestenes & Stiefel 1952, https://doi.org/10.6028/jres.049.044
    """
    size = length(vector)
    if size == 0:
        return torch.zeros_like(vector)
    unit = vector / size  # H u = v / |v|: no magnitude of v can overflow
    radius = 0.01 * torch.finfo(vector.dtype).max
    path = steihaug(product, -unit, radius, tolerance / 2, max_products, keep=0)
    if path.end in REASONS:
        raise NotDefiniteError(REASONS[path.end])
    solution = path.step(radius).step
    # The residual of the recurrence drifts away from the true one.
    error = float(torch.linalg.vector_norm(unit - product(solution)))
    if not error <= tolerance:
        raise NotDefiniteError(
            f"too ill-conditioned for conjugate gradients (residual {error:.2g} after {path.n_products} products, "
            f"{tolerance:.2g} wanted)"
        )
    return solution * size
