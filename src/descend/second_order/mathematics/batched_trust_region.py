"""Steps in trust regions with dense Hessians, for many problems at once.

The models and their units are those of ``trust_region.DenseModel`` and of ``DenseNewton``.
"""

from __future__ import annotations

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
from descend.second_order.mathematics.dense_steps import (
    definite_minimizers,
    equilibrating,
    on_spheres,
    predicted,
    rounding,
    shortest_minimizers,
    without_noise,
)
from descend.second_order.mathematics.space import Array


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
        self.noise = rounding(numel, limits.eps)
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
        scale = array_of(equilibrating(tensor_of(hessians)))
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
        minimizers = definite_minimizers(tensor_of(hessians), tensor_of(grads), self.noise)
        self.newton[rows], self.newton_decrease[rows], self.is_definite[rows] = map(array_of, minimizers)

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
        exponent = grad_exponent - hessian_exponent
        shortest, inside_decrease = shortest_minimizers(values, parts)
        norm = times_power(row_products(shortest, shortest) ** 0.5, exponent)
        is_inside = (values[:, 0] >= 0) & (norm <= radius)
        inside_decrease = predicted(inside_decrease, grad_exponent + exponent, norm)
        unit, decrease = on_spheres(values, parts, (hessian_exponent, grad_exponent), radius)
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
        eigenvalues, eigenvectors = torch.linalg.eigh(tensor_of(take(self.hessian, rows)))
        values, vectors = array_of(eigenvalues.double()), array_of(eigenvectors)
        parts = doubles(multiply(vectors.swapaxes(1, 2), take(self.grad, rows)))
        self.values[rows], self.parts[rows] = without_noise(values, parts, self.noise)
        self.vectors[rows], self.has_spectrum[rows] = vectors, True
