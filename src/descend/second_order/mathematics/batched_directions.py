"""Descent directions of quasi-Newton methods for many problems at once, each with a history of its own.

The methods and their letters are those of ``directions.py``. Vectors are rows of arrays (K, n). Rows never mix: NaN in
one problem stays there.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch

from descend.second_order.mathematics.arrays import (
    cast,
    combine,
    doubles,
    full,
    keep,
    library,
    multiply,
    row_products,
    take,
)
from descend.second_order.mathematics.diagonal import LEAST_COSINE, SPREAD
from descend.second_order.mathematics.directions import LEAST_FACTOR
from descend.second_order.mathematics.space import SAMPLE, Array


class ManyDirections(Protocol):
    """Models of the curvature of K problems, which give search directions."""

    @property
    def is_steepest(self) -> Array:
        """Where nothing has been learned, (K,)."""

    def update(self, rows: Array, s: Array, y: Array) -> None:
        """Learn in some problems that the gradient changed by y along s, where s'y > 0; rows of s and y are theirs."""

    def directions(self, grads: Array) -> Array:
        """The directions -H grad, in new memory; the negative gradient where nothing has been learned."""

    def reset(self, rows: Array) -> None:
        """Forget what was learned in some problems."""

    def keep(self, rows: Array) -> None:
        """Forget all problems but these."""


class DenseInverses:
    """BFGS inverse Hessians as dense matrices, O(n**2) memory for each problem.

    Source: as ``directions.DenseInverse``.
    """

    def __init__(self, like: Array) -> None:
        count, numel = like.shape
        self.is_steepest = full(like, count, True)
        self.inverse = cast(full(like, (count, numel, numel), 0.0), like)
        self.identity = library(like).eye(numel, dtype=like.dtype)
        if isinstance(like, torch.Tensor):
            self.identity = self.identity.to(like.device)
        self.inverse[:] = self.identity

    def update(self, rows: Array, s: Array, y: Array) -> None:
        xp: Any = library(s)
        inverse, sy = take(self.inverse, rows), row_products(s, y)
        first = take(self.is_steepest, rows)[:, None, None]
        scale = cast(sy / row_products(y, y), s)[:, None, None]
        inverse = xp.where(first, scale * self.identity, inverse)
        hy = multiply(inverse, y)
        # (I - s y'/sy) H (I - y s'/sy) + s s'/sy, multiplied out: a symmetric update of rank two.
        half = cast((1 + row_products(y, hy) / sy) / 2, s)[:, None] * s - hy
        along = s / cast(sy, s)[:, None]
        outer = half[:, :, None] * along[:, None, :]
        inverse += outer
        inverse += outer.swapaxes(1, 2)
        self.inverse[rows] = inverse
        self.is_steepest[rows] = False

    def directions(self, grads: Array) -> Array:
        return -multiply(self.inverse, grads)

    def reset(self, rows: Array) -> None:
        self.inverse[rows] = self.identity
        self.is_steepest[rows] = True

    def keep(self, rows: Array) -> None:
        keep(self, ("inverse", "is_steepest"), rows)


class CompactInverses:
    """L-BFGS inverse Hessians in compact form, with diagonals that learn the scale of each variable.

    In the letters of ``directions.CompactInverse``,

        H grad = q + S' p,    u = R^-1 S grad,    q = D (grad - Y' u),    p = R^-T (E u - Y q)

    which are its formulas, ordered so that Y D Y' is not needed: with D new in each iteration, it would be the most
    expensive part. A history that is not full has rows of zeros, which change nothing.

    Args:
        like: the points, (K, n).
        history_size: pairs kept, >= 1.
        learns_from_all: whether diagonals learn from variables that stayed where they were, as on a bound.

    Source: Byrd, Nocedal & Schnabel 1994, Theorem 2.2, https://doi.org/10.1007/BF01582063
    """

    _ARRAYS: ClassVar = ("count", "steps", "changes", "diagonal", "r_inverse", "curvatures")

    def __init__(self, like: Array, history_size: int, learns_from_all: bool = True) -> None:
        count, numel = like.shape
        self.learns_from_all = learns_from_all
        self.history_size = history_size
        self.count = full(like, count, 0)  # pairs taken so far
        self.steps = cast(full(like, (count, history_size, numel), 0.0), like)
        self.changes = cast(full(like, (count, history_size, numel), 0.0), like)
        self.diagonal = cast(full(like, (count, numel), 1.0), like)
        self.r_inverse = full(like, (count, history_size, history_size), 0.0)
        self.curvatures = full(like, (count, history_size), 1.0)  # the diagonal of E

    @property
    def is_steepest(self) -> Array:
        return self.count == 0

    def reset(self, rows: Array) -> None:
        self.count[rows] = 0
        for array, number in (
            (self.steps, 0.0),
            (self.changes, 0.0),
            (self.diagonal, 1.0),
            (self.r_inverse, 0.0),
            (self.curvatures, 1.0),
        ):
            array[rows] = number

    def keep(self, rows: Array) -> None:
        keep(self, self._ARRAYS, rows)

    def update(self, rows: Array, s: Array, y: Array) -> None:
        slots = take(self.count, rows) % self.history_size
        scale = cast(row_products(s, y) ** -0.5, s)[:, None]
        s, y = scale * s, scale * y
        moved = y if self.learns_from_all else library(s).where(s != 0, y, 0.0)
        self.diagonal[rows], curvature = learned_diagonals(take(self.diagonal, rows), s, moved)
        self.steps[rows, slots], self.changes[rows, slots] = s, y
        self.curvatures[rows, slots] = curvature
        # R^-1 loses a row and a column with the pair that is replaced, and gains a column.
        column = doubles(multiply(take(self.steps, rows), y))
        self.r_inverse[rows, slots] = 0.0
        self.r_inverse[rows, :, slots] = 0.0
        self.r_inverse[rows, :, slots] = multiply(take(self.r_inverse, rows), column) / -curvature[:, None]
        self.r_inverse[rows, slots, slots] = 1 / curvature
        self.count[rows] += 1

    def directions(self, grads: Array) -> Array:
        u = multiply(self.r_inverse, doubles(multiply(self.steps, grads)))
        q = self.diagonal * (grads - combine(cast(u, grads), self.changes))
        p = combine(self.curvatures * u - doubles(multiply(self.changes, q)), self.r_inverse)
        return -(q + combine(cast(p, grads), self.steps))


def learned_diagonals(diagonal: Array, s: Array, y: Array) -> tuple[Array, Array]:
    """Diagonal inverse Hessians updated by a pair each, and s'y; as ``diagonal.learn_diagonal_``."""
    growth, shrinkage = diagonal * y, s / diagonal
    y_dy, s_ds, curvature = row_products(growth, y), row_products(shrinkage, s), row_products(s, y)
    least = LEAST_COSINE * y_dy**0.5 * s_ds**0.5
    curvature = curvature + (least - curvature) * (curvature < least)
    change = growth * y / cast(y_dy, s)[:, None] - shrinkage * s / cast(s_ds, s)[:, None] + 1.0
    diagonal = diagonal * cast(curvature / y_dy, s)[:, None] / change
    return clipped_around_medians(diagonal), curvature


def clipped_around_medians(diagonal: Array) -> Array:
    """Clip each row to within a factor of its median; as ``diagonal.clip_around_median_``."""
    xp: Any = library(diagonal)
    some = diagonal[:, :: 1 + diagonal.shape[1] // SAMPLE]
    if xp is torch:
        middle = some.median(1).values[:, None]
    else:
        position = (some.shape[1] - 1) // 2
        middle = xp.partition(some, position, axis=1)[:, position, None]
    return xp.minimum(xp.maximum(diagonal, middle / SPREAD), middle * SPREAD)


def modified_secant_factors(sy: Array, value: Array, value_new: Array, slopes: Array) -> Array:
    """Factors for y, (K,); as ``directions.modified_secant_factor``."""
    xp: Any = library(sy)
    theta = 6 * (value - value_new) + 3 * slopes
    is_safe = (abs(theta) <= 3 * sy) & (sy + theta > LEAST_FACTOR * sy)
    return xp.where(is_safe, 1 + theta / sy, 1.0)
