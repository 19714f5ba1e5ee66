"""Descent directions of quasi-Newton methods for many problems at once, each with a history of its own.

The methods and their letters are those of ``directions.py``. Vectors are rows of arrays (K, n). Rows never mix: NaN in
one problem stays there.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Protocol

import torch

from descend.second_order.mathematics.arrays import (
    cast,
    combine,
    doubles,
    full,
    identity,
    keep,
    library,
    multiply,
    positions,
    row_products,
    take,
)
from descend.second_order.mathematics.dense_inverse import BEGINNING
from descend.second_order.mathematics.diagonal import LEAST_COSINE, SPREAD
from descend.second_order.mathematics.directions import LEAST_FACTOR
from descend.second_order.mathematics.space import SAMPLE, Array


class Learner(Protocol):
    """Models of the curvature of K problems."""

    @property
    def is_steepest(self) -> Array:
        """Where nothing has been learned, (K,)."""

    def update(self, rows: Array, s: Array, y: Array) -> None:
        """Learn in some problems that the gradient changed by y along s, where s'y > 0; rows of s and y are theirs."""

    def reset(self, rows: Array) -> None:
        """Forget what was learned in some problems."""

    def keep(self, rows: Array) -> None:
        """Forget all problems but these."""


class ManyDirections(Learner, Protocol):
    """Models of the curvature of K problems, which give search directions."""

    def directions(self, grads: Array) -> Array:
        """The directions -H grad, in new memory; the negative gradient where nothing has been learned."""


class Histories:
    """The last pairs s, y of K problems, scaled to s'y = 1, and diagonals that learn the scale of each variable.

    A history that is not full has rows of zeros.

    Args:
        like: the points, (K, n).
        history_size: pairs kept, >= 1.
        learns_from_all: whether diagonals learn from variables that stayed where they were, as on a bound.
    """

    _ARRAYS: ClassVar[tuple[str, ...]] = ("count", "steps", "changes", "diagonal", "curvatures")

    def __init__(self, like: Array, history_size: int, learns_from_all: bool = True) -> None:
        count, numel = like.shape
        self.learns_from_all = learns_from_all
        self.history_size = history_size
        self.count = full(like, count, 0)  # pairs taken so far
        self.steps = cast(full(like, (count, history_size, numel), 0.0), like)
        self.changes = cast(full(like, (count, history_size, numel), 0.0), like)
        self.diagonal = cast(full(like, (count, numel), 1.0), like)
        self.curvatures = full(like, (count, history_size), 1.0)  # s'y, or a little more

    @property
    def is_steepest(self) -> Array:
        """Where nothing has been learned, (K,)."""
        return self.count == 0

    def reset(self, rows: Array) -> None:
        """Forget what was learned in some problems."""
        self.count[rows] = 0
        for array, number in (
            (self.steps, 0.0),
            (self.changes, 0.0),
            (self.diagonal, 1.0),
            (self.curvatures, 1.0),
        ):
            array[rows] = number

    def keep(self, rows: Array) -> None:
        """Forget all problems but these."""
        keep(self, self._ARRAYS, rows)

    def update(self, rows: Array, s: Array, y: Array) -> None:
        """Learn in some problems that the gradient changed by y along s, where s'y > 0; rows of s and y are theirs."""
        slots = take(self.count, rows) % self.history_size
        scale = cast(row_products(s, y) ** -0.5, s)[:, None]
        s, y = scale * s, scale * y
        moved = y if self.learns_from_all else library(s).where(s != 0, y, 0.0)
        self.diagonal[rows], self.curvatures[rows, slots] = learned_diagonals(take(self.diagonal, rows), s, moved)
        self.steps[rows, slots], self.changes[rows, slots] = s, y
        self.count[rows] += 1


class CompactInverses(Histories):
    """L-BFGS inverse Hessians in compact form.

    In the letters of ``directions.CompactInverse``, with the diagonals D of the histories, and E of their curvatures,

        H grad = q + S' p,    u = R^-1 S grad,    q = D (grad - Y' u),    p = R^-T (E u - Y q)

    which are its formulas, ordered so that Y D Y' is not needed: with D new in each iteration, it would be the most
    expensive part. Rows of zeros change nothing.

    Source: Byrd, Nocedal & Schnabel 1994, Theorem 2.2, https://doi.org/10.1007/BF01582063
    """

    _ARRAYS: ClassVar = (*Histories._ARRAYS, "r_inverse")

    def __init__(self, like: Array, history_size: int, learns_from_all: bool = True) -> None:
        super().__init__(like, history_size, learns_from_all)
        self.r_inverse = full(like, (len(like), history_size, history_size), 0.0)

    def reset(self, rows: Array) -> None:
        super().reset(rows)
        self.r_inverse[rows] = 0.0

    def update(self, rows: Array, s: Array, y: Array) -> None:
        slots = take(self.count, rows) % self.history_size
        super().update(rows, s, y)
        # R^-1 loses a row and a column with the pair that is replaced, and gains a column.
        curvature = self.curvatures[rows, slots]
        column = doubles(multiply(take(self.steps, rows), self.changes[rows, slots]))
        self.r_inverse[rows, slots] = 0.0
        self.r_inverse[rows, :, slots] = 0.0
        self.r_inverse[rows, :, slots] = multiply(take(self.r_inverse, rows), column) / -curvature[:, None]
        self.r_inverse[rows, slots, slots] = 1 / curvature

    def directions(self, grads: Array) -> Array:
        u = multiply(self.r_inverse, doubles(multiply(self.steps, grads)))
        q = self.diagonal * (grads - combine(cast(u, grads), self.changes))
        p = combine(self.curvatures * u - doubles(multiply(self.changes, q)), self.r_inverse)
        return -(q + combine(cast(p, grads), self.steps))

    def matrices(self, rows: Array) -> Array:
        """H of some problems, whose histories are full, as matrices (k, n, n)."""
        xp: Any = library(self.diagonal)
        steps, changes, diagonal = (take(array, rows) for array in (self.steps, self.changes, self.diagonal))
        # With Z = R^-1 S and W = Y D: H = D + Z' ((Y D Y' + E) Z - W) - W' Z.
        z = xp.matmul(take(self.r_inverse, rows), doubles(steps))
        w = doubles(changes * diagonal[:, None, :])
        middle = xp.matmul(w, doubles(changes).swapaxes(1, 2))
        turned = xp.matmul(middle, z) + take(self.curvatures, rows)[:, :, None] * z - w
        matrices = xp.matmul(z.swapaxes(1, 2), turned) - xp.matmul(w.swapaxes(1, 2), z)
        matrices = (matrices + matrices.swapaxes(1, 2)) / 2
        return cast(matrices, diagonal) + diagonal[:, :, None] * identity(diagonal)


class DenseInverses:
    """BFGS inverse Hessians as dense matrices, O(n**2) memory for each problem; as ``dense_inverse.DenseInverse``.

    The first ``history_size`` pairs of each problem are those of ``CompactInverses``; then its matrix is written out,
    and updated from there on.

    Source: Nocedal & Wright 2006, Algorithm 6.1.
    """

    def __init__(self, like: Array, history_size: int = BEGINNING) -> None:
        count, numel = like.shape
        self.beginning = CompactInverses(like, history_size)
        self.inverse = cast(full(like, (count, numel, numel), 0.0), like)

    @property
    def is_steepest(self) -> Array:
        return self.beginning.is_steepest

    @property
    def is_dense(self) -> Array:
        """Where the matrix has been written out, (K,)."""
        return self.beginning.count == self.beginning.history_size

    def update(self, rows: Array, s: Array, y: Array) -> None:
        is_dense = take(self.is_dense, rows)
        new, old = positions(~is_dense), positions(is_dense)
        if len(new):
            places = take(rows, new)
            self.beginning.update(places, take(s, new), take(y, new))
            if len(last := positions(take(self.is_dense, places))):
                self.inverse[take(places, last)] = self.beginning.matrices(take(places, last))
        if len(old):
            self._update(take(rows, old), take(s, old), take(y, old))

    def _update(self, rows: Array, s: Array, y: Array) -> None:
        xp: Any = library(s)
        inverse = take(self.inverse, rows)
        hy = multiply(inverse, y)
        sy, yhy = row_products(s, y), row_products(y, hy)
        # (I - s y'/sy) H (I - y s'/sy) + s s'/sy, multiplied out: a symmetric update of rank two.
        half = cast((1 + yhy / sy) / 2, s)[:, None] * s - hy
        along = s / cast(sy, s)[:, None]
        outer = half[:, :, None] * along[:, None, :]
        is_positive = (sy > 0) & (sy < math.inf) & (yhy > 0) & (yhy < math.inf)
        update = outer + outer.swapaxes(1, 2)
        self.inverse[rows] = xp.where(is_positive[:, None, None], inverse + update, inverse)

    def directions(self, grads: Array) -> Array:
        is_dense = self.is_dense
        if not bool(is_dense.any()):
            return self.beginning.directions(grads)
        dense = -multiply(self.inverse, grads)
        if bool(is_dense.all()):
            return dense
        return library(grads).where(is_dense[:, None], dense, self.beginning.directions(grads))

    def reset(self, rows: Array) -> None:
        self.beginning.reset(rows)

    def keep(self, rows: Array) -> None:
        self.beginning.keep(rows)
        keep(self, ("inverse",), rows)


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
