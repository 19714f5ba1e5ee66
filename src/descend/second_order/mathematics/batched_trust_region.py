"""Steps in trust regions with dense Hessians, for many problems at once.

The models, their units and their minimizers are those of ``trust_region.DenseModel`` and of ``DenseNewton``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from descend.second_order.mathematics.arrays import (
    array_of,
    cast,
    doubles,
    full,
    keep,
    largest_entries,
    library,
    multiply,
    positions,
    row_products,
    take,
    tensor_of,
    times_power,
)
from descend.second_order.mathematics.space import Array

ROUNDING = 8  # a few units in the last place are noise
EQUILIBRATIONS = 5  # each takes the square root of the largest entries, so that they approach 1


class TrialSteps(NamedTuple):
    """Steps and what the models predict for them: ``trust_region.TrialStep`` of each problem; (k, n) and (k,)."""

    step: Array
    norm: Array
    decrease: Array
    on_boundary: Array
    negative_curvature: Array


class DenseModels:
    """Quadratic models of K problems, in the units in which their Hessians are equilibrated.

    Args:
        like: the points, (K, n).
    """

    _ARRAYS = (
        *("hessian", "grad", "scale", "hessian_exponent", "grad_exponent", "newton", "newton_decrease"),
        *("is_definite", "has_spectrum", "values", "parts", "vectors"),
    )

    def __init__(self, like: Array) -> None:
        count, numel = like.shape
        self.xp = library(like)
        limits = torch.finfo(tensor_of(like).dtype)
        self.noise = ROUNDING * math.sqrt(numel) * limits.eps
        self.limit = 1000 if limits.bits == 64 else 120  # beyond, the factor would overflow

        def zeros(*shape: int, number: float | bool = 0.0, dtype: Array = like) -> Array:
            array = full(like, (count, *shape), number)
            return array if isinstance(number, bool | int) else cast(array, dtype)

        wide = full(like, 0, 0.0)  # what is computed in float64
        self.hessian, self.vectors = zeros(numel, numel), zeros(numel, numel)
        self.grad, self.scale = zeros(numel), zeros(numel)
        self.hessian_exponent, self.grad_exponent = zeros(number=0), zeros(number=0)
        self.newton, self.values, self.parts = (
            zeros(numel, dtype=wide),
            zeros(numel, dtype=wide),
            zeros(numel, dtype=wide),
        )
        self.newton_decrease = zeros(dtype=wide)
        self.is_definite, self.has_spectrum = zeros(number=False), zeros(number=False)

    def keep(self, rows: Array) -> None:
        """Forget all models but these."""
        keep(self, self._ARRAYS, rows)

    def renew(self, rows: Array, hessians: Array, grads: Array) -> None:
        """Make new models of some problems, from finite Hessians and gradients."""
        xp: Any = self.xp
        scale = equilibrating(hessians)
        hessians, grads = hessians / scale[:, :, None] / scale[:, None, :], grads / scale
        exponents = []
        for array in (hessians.reshape(len(rows), -1), grads):
            exponent = xp.frexp(largest_entries(array))[1] + full(grads, len(rows), 0)
            exponents.append(exponent.clip(-self.limit, self.limit))
        hessians = cast(times_power(hessians, -exponents[0][:, None, None]), hessians)
        grads = cast(times_power(grads, -exponents[1][:, None]), grads)
        self.hessian[rows], self.grad[rows], self.scale[rows] = hessians, grads, scale
        self.hessian_exponent[rows], self.grad_exponent[rows] = exponents
        self.has_spectrum[rows] = False
        # The minimizers in all space by Cholesky. What elimination leaves of the diagonal, relative to it, is blind to
        # bad scaling, unlike the condition number.
        factor, info = torch.linalg.cholesky_ex(tensor_of(hessians))
        pivots = factor.diagonal(dim1=1, dim2=2).square() / tensor_of(hessians).diagonal(dim1=1, dim2=2)
        half = torch.linalg.solve_triangular(factor, -tensor_of(grads)[:, :, None], upper=False)
        step = torch.linalg.solve_triangular(factor.mT, half, upper=True)[:, :, 0].double()
        decrease = half[:, :, 0].double().square().sum(1) / 2
        is_definite = (info == 0) & (pivots > self.noise).all(1) & decrease.isfinite()
        self.newton[rows], self.newton_decrease[rows] = array_of(step), array_of(decrease)
        self.is_definite[rows] = array_of(is_definite)

    def step(self, rows: Array, radius: Array) -> TrialSteps:
        """The minimizers of some models over |s| <= radius, (k,), > 0."""
        exponent = take(self.grad_exponent - self.hessian_exponent, rows)
        newton = take(self.newton, rows)
        norm = times_power(row_products(newton, newton) ** 0.5, exponent)
        is_inside = take(self.is_definite, rows) & (norm <= radius)
        steps, decrease = times_power(newton, exponent[:, None]), take(self.newton_decrease, rows)
        decrease = predicted(decrease, take(self.grad_exponent, rows) + exponent, norm)
        trial = TrialSteps(steps, norm, decrease, *(full(radius, len(rows), False) for _ in range(2)))
        others = positions(~is_inside)
        if len(others):
            by_spectrum = self._by_spectrum(take(rows, others), take(radius, others))
            for old, new in zip(trial, by_spectrum, strict=True):
                old[others] = new
        return trial._replace(step=cast(trial.step, self.grad) / take(self.scale, rows))

    def _by_spectrum(self, rows: Array, radius: Array) -> TrialSteps:
        """The same by eigenvectors; also for indefinite and singular models."""
        xp: Any = self.xp
        new = take(rows, positions(~take(self.has_spectrum, rows)))
        if len(new):
            self._decompose(new)
        values, parts, vectors = (take(array, rows) for array in (self.values, self.parts, self.vectors))
        hessian_exponent, grad_exponent = take(self.hessian_exponent, rows), take(self.grad_exponent, rows)
        # The shortest minimizer in all space, unless a curvature is negative.
        exponent = grad_exponent - hessian_exponent
        shortest = xp.where(parts != 0, -parts / values, 0.0)
        norm = times_power(row_products(shortest, shortest) ** 0.5, exponent)
        is_inside = (values[:, 0] >= 0) & (norm <= radius)
        inside_decrease = predicted(-row_products(parts, shortest) / 2, grad_exponent + exponent, norm)
        # In units of the radius H is 2**ratio times g; the larger of the two is not scaled.
        mantissa, power = xp.frexp(radius)
        ratio = power - exponent
        larger = ratio * (ratio > 0)
        unit, decrease = on_unit_spheres(
            times_power(mantissa[:, None] * values, (ratio - larger)[:, None]), times_power(parts, -larger[:, None])
        )
        decrease = predicted(mantissa * decrease, power + grad_exponent + larger, radius)
        step = xp.where(is_inside[:, None], times_power(shortest, exponent[:, None]), radius[:, None] * unit)
        return TrialSteps(
            doubles(multiply(vectors, cast(step, vectors))),
            xp.where(is_inside, norm, radius),
            xp.where(is_inside, inside_decrease, decrease),
            ~is_inside,
            ~is_inside & (values[:, 0] < 0),
        )

    def _decompose(self, rows: Array) -> None:
        """Eigenvalues, ascending, coefficients of the gradient, and eigenvectors, with rounding errors as zeros."""
        xp: Any = self.xp
        eigenvalues, eigenvectors = torch.linalg.eigh(tensor_of(take(self.hessian, rows)))
        values, vectors = array_of(eigenvalues.double()), array_of(eigenvectors)
        parts = doubles(multiply(vectors.swapaxes(1, 2), take(self.grad, rows)))
        is_flat = abs(values) <= self.noise * largest_entries(values)[:, None]
        values = xp.where(is_flat & (values < 0), 0.0, values)
        length = row_products(parts, parts) ** 0.5
        parts = xp.where(is_flat & (abs(parts) <= self.noise * length[:, None]), 0.0, parts)
        self.values[rows], self.parts[rows], self.vectors[rows] = values, parts, vectors
        self.has_spectrum[rows] = True


def equilibrating(matrices: Array) -> Array:
    """d (K, n), of geometric mean 1, such that nonzero rows of each matrix / dd' have nearly equal largest entries."""
    rest = tensor_of(matrices).abs()
    logarithms = torch.zeros_like(rest[:, 0])
    is_zero = rest.amax(2) == 0
    for _ in range(EQUILIBRATIONS):
        factor = torch.where(is_zero, 1.0, rest.amax(2).sqrt())
        rest = rest / factor[:, :, None] / factor[:, None, :]
        logarithms += factor.log()
    mean = torch.where(is_zero, torch.nan, logarithms).nanmean(1, keepdim=True).nan_to_num()
    return array_of(torch.where(is_zero, 0.0, logarithms - mean).exp())


def on_unit_spheres(eigenvalues: Array, coefficients: Array) -> tuple[Array, Array]:
    """Minimizers t of c't + sum(d t^2) / 2 over |t| = 1, and the decreases; as ``trust_region._on_unit_sphere``.

    Source: Moré & Sorensen 1983, https://doi.org/10.1137/0904038
    """
    xp: Any = library(eigenvalues)
    least = eigenvalues[:, 0]
    gaps, present = eigenvalues - least[:, None], coefficients != 0
    # No |c| / (gap + nu) exceeds 1 at the solution. From below Newton's method rises to it and never passes.
    bound = xp.where(present, abs(coefficients) - gaps, 0.0)
    nu = array_of(tensor_of(bound).amax(1).clamp(min=0.0))
    nu = xp.where(least > nu, least, nu)
    going = full(nu, len(nu), True)
    while True:
        shifted = gaps + nu[:, None]
        unit = xp.where(present, -coefficients / shifted, 0.0)
        norm = row_products(unit, unit) ** 0.5
        higher = nu + (norm - 1) * norm * norm / xp.where(present, unit * unit / shifted, 0.0).sum(1)
        going = going & (higher > nu)
        if not bool(going.any()):
            break
        nu = xp.where(going, higher, nu)
    # The hard case: g has no part along the lowest eigenvector, which gives what is missing.
    missing = (1 - norm) * (1 + norm)
    unit[:, 0] = xp.where((nu == 0) & (missing > 0), abs(missing) ** 0.5, xp.where(nu == 0, 0.0, unit[:, 0]))
    unit = unit / row_products(unit, unit)[:, None] ** 0.5
    rest = nu - least
    return unit, (((gaps + nu[:, None]) * unit * unit).sum(1) + xp.where(rest > 0, rest, 0.0)) / 2


def predicted(mantissa: Array, exponent: Array, norm: Array) -> Array:
    """Decreases as finite numbers, positive for steps that are not zero even where they underflow."""
    xp: Any = library(mantissa)
    number = times_power(mantissa, exponent).clip(math.ulp(0.0), torch.finfo(torch.float64).max)
    return xp.where(norm > 0, number, 0.0)


def first_minima(fall: Array, slope_before: Array, curvature: Array, slope: Array) -> tuple[Array, Array]:
    """The first minima of quartics along steps, and how far they fall to there; as ``quartic.first_minimum``.

    NaN where there is none. In 1 / t, the slope of q(t) = -t + h t^2 / 2 + c t^3 + d t^4 is a cubic with a leading
    coefficient of 1: its largest zero is the first one of the slope.
    """
    xp: Any = library(fall)
    unit = -slope_before
    h, value, end = curvature / unit, -fall / unit, slope / unit
    excess, turn = value + 1 - h / 2, end + 1 - h
    c, d = 4 * excess - turn, turn - 3 * excess
    is_there = xp.isfinite(c) & xp.isfinite(d) & xp.isfinite(h) & (slope_before < 0)
    h, c, d = (xp.where(is_there, number, 0.0) for number in (h, c, d))
    u = largest_zeros(-h, -3 * c, -4 * d)
    t = 1 / u
    is_there = is_there & (u > 0) & xp.isfinite(t)
    return xp.where(is_there, t, math.nan), xp.where(is_there, t * (1 - t * (h / 2 + t * (c + t * d))) * unit, math.nan)


def largest_zeros(a2: Array, a1: Array, a0: Array) -> Array:
    """The largest real zeros of the cubics u^3 + a2 u^2 + a1 u + a0; zeros within rounding of a double one are real.

    Source: Cardano and Viète, as in Press et al. 2007, Numerical Recipes, section 5.6; then Newton's method.
    """
    xp: Any = library(a2)
    scale = xp.maximum(abs(a2), xp.maximum(abs(a1) ** 0.5, abs(a0) ** (1 / 3)))
    scale = xp.where(scale > 0, scale, 1.0)
    a2, a1, a0 = a2 / scale, a1 / scale / scale, a0 / scale / scale / scale
    p, q = (a2 * a2 - 3 * a1) / 9, (2 * a2 * a2 * a2 - 9 * a2 * a1 + 27 * a0) / 54
    discriminant = q * q - p * p * p
    # Three real zeros: the largest is the one at the angle nearest to 0.
    root = xp.where(p > 0, abs(p) ** 0.5, 1.0)
    cosine = (-q / root / root / root).clip(-1.0, 1.0)
    three = xp.where(p > 0, 2 * root * xp.cos(xp.arccos(cosine) / 3), 0.0)
    # One real zero, and a pair whose imaginary part may be rounding.
    one = (abs(q) + xp.where(discriminant > 0, abs(discriminant), 0.0) ** 0.5) ** (1 / 3)
    one = xp.where(q > 0, -one, one)
    other = xp.where(one != 0, p / one, 0.0)
    u = xp.where(discriminant > 0, one + other, three) - a2 / 3
    pair = -(one + other) / 2 - a2 / 3
    is_real = (discriminant > 0) & (abs(one - other) * 0.75**0.5 <= 1e-7 * abs(pair)) & (pair > u)
    for _ in range(3):
        value = ((u + a2) * u + a1) * u + a0
        better = u - value / ((3 * u + 2 * a2) * u + a1)
        is_better = abs(((better + a2) * better + a1) * better + a0) < abs(value)
        u = xp.where(is_better, better, u)
    return scale * xp.where(is_real, pair, u)
