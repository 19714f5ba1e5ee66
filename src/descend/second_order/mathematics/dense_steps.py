"""Minimizers of quadratic models with dense Hessians, of K models at once; a single model is the first of one.

H and g are equilibrated or divided by powers of two before, so that nothing here overflows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from descend.second_order.mathematics.arrays import (
    array_of,
    choose,
    full,
    largest_entries,
    library,
    row_products,
    tensor_of,
    times_power,
)
from descend.second_order.mathematics.space import Array

ROUNDING = 8  # a few units in the last place are noise
EQUILIBRATIONS = 5  # each takes the square root of the largest entries, so that they approach 1


def rounding(numel: int, eps: float) -> float:
    """The share of the largest eigenvalue, or coefficient, below which others are noise."""
    return ROUNDING * math.sqrt(numel) * eps


def equilibrating(matrices: Tensor) -> Tensor:
    """d (K, n), of geometric mean 1, such that nonzero rows of each matrix / dd' have nearly equal largest entries.

    Source: Ruiz 2001, A scaling algorithm to equilibrate both rows and columns norms in matrices, RAL-TR-2001-034.
    """
    rest = matrices.abs()
    logarithms = matrices.new_zeros(matrices.shape[:2])
    if not rest.shape[1]:
        return logarithms
    is_zero = rest.amax(2) == 0
    for _ in range(EQUILIBRATIONS):
        factor = torch.where(is_zero, 1.0, rest.amax(2).sqrt())
        rest = rest / factor[:, :, None] / factor[:, None, :]
        logarithms += factor.log()
    mean = torch.where(is_zero, torch.nan, logarithms).nanmean(1, keepdim=True).nan_to_num()
    return torch.where(is_zero, 0.0, logarithms - mean).exp()


def definite_minimizers(hessians: Tensor, grads: Tensor, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """The minimizers in all space by Cholesky.

    Args:
        hessians: H, (K, n, n).
        grads: g, (K, n).
        noise: see ``rounding``.
    Returns:
        Steps (K, n) and decreases (K,) in float64, and where H is positive definite beyond rounding, (K,).
    """
    factor, info = torch.linalg.cholesky_ex(hessians)
    # What elimination leaves of the diagonal, relative to it: unlike the condition number, blind to bad scaling.
    pivots = factor.diagonal(dim1=1, dim2=2).square() / hessians.diagonal(dim1=1, dim2=2)
    half = torch.linalg.solve_triangular(factor, -grads[:, :, None], upper=False)
    step = torch.linalg.solve_triangular(factor.mT, half, upper=True)[:, :, 0].double()
    decrease = half[:, :, 0].double().square().sum(1) / 2
    return step, decrease, (info == 0) & (pivots > noise).all(1) & decrease.isfinite()


def without_noise(eigenvalues: Array, parts: Array, noise: float) -> tuple[Array, Array]:
    """Eigenvalues, and coefficients of g, with those within rounding of zero as zeros; (K, n)."""
    xp: Any = library(eigenvalues)
    is_flat = abs(eigenvalues) <= noise * largest_entries(eigenvalues)[:, None]
    length = row_products(parts, parts) ** 0.5
    is_nothing = is_flat & (abs(parts) <= noise * length[:, None])
    return xp.where(is_flat & (eigenvalues < 0), 0.0, eigenvalues), xp.where(is_nothing, 0.0, parts)


def shortest_minimizers(eigenvalues: Array, parts: Array) -> tuple[Array, Array]:
    """The shortest minimizers in all space where no eigenvalue is negative, and the decreases; (K, n) and (K,)."""
    step = library(parts).where(parts != 0, -parts / eigenvalues, 0.0)
    return step, -row_products(parts, step) / 2


def on_spheres(eigenvalues: Array, parts: Array, exponents: tuple[Array, Array], radius: Array) -> tuple[Array, Array]:
    """The minimizers over |s| = radius, in units of the radius, and the decreases.

    Args:
        eigenvalues: of H, ascending, (K, n).
        parts: coefficients of g, (K, n).
        exponents: of the powers of two by which H and g have been divided, (K,).
        radius: (K,).
    """
    # In units of the radius H is 2**ratio times g; the larger of the two is not scaled.
    mantissa, power = library(radius).frexp(radius)
    ratio = power + exponents[0] - exponents[1]
    larger = ratio * (ratio > 0)
    values = times_power(mantissa[:, None] * eigenvalues, (ratio - larger)[:, None])
    unit, decrease = on_unit_spheres(values, times_power(parts, -larger[:, None]))
    return unit, predicted(mantissa * decrease, power + exponents[1] + larger, radius)


def on_unit_spheres(eigenvalues: Array, coefficients: Array) -> tuple[Array, Array]:
    """Minimizers t of c't + sum(d t^2) / 2 over |t| = 1 where none is inside, and the decreases; d ascends.

    t = -c / (d + mu), Newton's method on 1 / |t(mu)| = 1. The variable is nu = mu + d[0], the distance from the pole,
    so that the hard case and its neighbours lose no digit.

    Source: Moré & Sorensen 1983, https://doi.org/10.1137/0904038
    """
    xp: Any = library(eigenvalues)
    least = eigenvalues[:, 0]
    gaps, present = eigenvalues - least[:, None], coefficients != 0
    # No |c| / (gap + nu) exceeds 1 at the solution. From below Newton's method rises to it and never passes.
    nu = array_of(tensor_of(xp.where(present, abs(coefficients) - gaps, 0.0)).amax(1).clamp(min=0.0))
    nu = xp.where(least > nu, least, nu)
    going = full(nu, len(nu), True)
    gaps_present = xp.where(present, gaps, 1.0)  # where c is zero so is t, without 0 / 0
    while True:
        shifted = gaps_present + nu[:, None]
        unit = -coefficients / shifted
        square = row_products(unit, unit)
        norm = square**0.5
        higher = nu + (norm - 1) * square / row_products(unit, unit / shifted)
        going = going & (higher > nu)
        if not going.any():
            break
        nu = xp.where(going, higher, nu)
    # The hard case: g has no part along the lowest eigenvector, which gives what is missing.
    missing = (1 - norm) * (1 + norm)
    unit[:, 0] = xp.where((nu == 0) & (missing > 0), abs(missing) ** 0.5, xp.where(nu == 0, 0.0, unit[:, 0]))
    unit = unit / row_products(unit, unit)[:, None] ** 0.5
    rest = nu - least
    return unit, (((gaps + nu[:, None]) * unit * unit).sum(1) + xp.where(rest > 0, rest, 0.0)) / 2


def predicted(mantissa: Any, exponent: Any, norm: Any) -> Any:
    """Decreases as finite numbers, positive for steps that are not zero even where they underflow."""
    number = times_power(mantissa, exponent).clip(math.ulp(0.0), torch.finfo(torch.float64).max)
    return choose(norm > 0, number, 0.0)
