"""Minimizers of quadratic models in boxes, for many problems at once; ``solvers/box.py`` does it for one.

Most steps stay away from the bounds. Those are steps of L-BFGS without bounds, and cost no more. Only where a bound is
in the way does a problem get its Hessian as a dense matrix.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from descend.second_order.mathematics.arrays import (
    array_of,
    cast,
    full,
    largest_entries,
    library,
    multiply,
    positions,
    row_products,
    take,
    tensor_of,
)
from descend.second_order.mathematics.batched_directions import CompactInverses
from descend.second_order.mathematics.space import Array

INNER_ITERATIONS = 30  # projected Newton steps on a model; a few usually do
ACCURACY = 1e-2  # of a model's projected gradient, relative to its start
HALVINGS = 10
BLOCK = 2**24  # numbers in the dense matrices that exist at once


def box_directions(inverses: CompactInverses, grads: Array, low: Array, high: Array, where: Array) -> Array:
    """Minimizers d (K, n) of the models grad'd + d'B d / 2 over low <= d <= high, where low <= 0 <= high.

    ``where`` says which problems need one, (K,).
    """
    xp: Any = library(grads)
    directions = inverses.directions(grads)
    is_free = ((low < 0) | (grads < 0)) & ((high > 0) | (grads > 0))
    is_inside = (is_free & (low <= directions) & (directions <= high)).all(1)
    rows = positions(where & ~is_inside)
    block = max(1, BLOCK // max(1, grads.shape[1] ** 2))
    for start in range(0, len(rows), block):
        some = rows[start : start + block]
        hessians, diagonal = dense_hessians(inverses, some), take(inverses.diagonal, some)
        directions[some] = box_minimizers(hessians, diagonal, *(take(array, some) for array in (grads, low, high)))
    return xp.where(directions == 0, 0.0, directions)


def dense_hessians(inverses: CompactInverses, rows: Array) -> Array:
    """The inverses of some L-BFGS inverse Hessians as dense matrices (k, n, n).

    Source: Nocedal & Wright 2006, equation (6.19), pair after pair.
    """
    xp: Any = library(inverses.diagonal)
    count = take(inverses.count, rows)
    diagonal = take(inverses.diagonal, rows)
    hessians = (1 / diagonal)[:, :, None] * identity(diagonal)
    for age in range(inverses.history_size):
        slots = (count + age) % inverses.history_size  # the oldest first; slots never used have rows of zeros
        s, y = inverses.steps[rows, slots], inverses.changes[rows, slots]
        bs = multiply(hessians, s)
        bend, curvature = row_products(s, bs), inverses.curvatures[rows, slots]
        bs = xp.where((bend > 0)[:, None], bs / cast(bend, s)[:, None] ** 0.5, 0.0)
        y = y / cast(curvature, s)[:, None] ** 0.5
        hessians = hessians + (y[:, :, None] * y[:, None, :] - bs[:, :, None] * bs[:, None, :])
    return hessians


def identity(like: Array) -> Array:
    """The identity matrix for vectors (K, n)."""
    return cast(array_of(torch.eye(like.shape[1], device=tensor_of(like).device)), like)


def box_minimizers(hessians: Array, diagonal: Array, grads: Array, low: Array, high: Array) -> Array:
    """Minimizers by projected Newton steps; ``diagonal`` approximates the inverse Hessians.

    Source: Bertsekas 1982, https://doi.org/10.1137/0320018
    """
    xp: Any = library(grads)
    d, residual = xp.zeros_like(grads), grads
    going = full(grads, len(grads), True)
    first = full(grads, len(grads), math.nan)
    for iteration in range(INNER_ITERATIONS):
        free = ((d > low) | (residual < 0)) & ((d < high) | (residual > 0))
        wanted = xp.where(free, residual, 0.0)
        norm = largest_entries(d - clamp(d - diagonal * wanted, low, high))
        first = norm if iteration == 0 else first
        going = going & (norm > ACCURACY * first)
        if not bool(going.any()):
            break
        newton = -solve_free(hessians, wanted, free)
        moved, is_found = projected_search(hessians, d, residual, newton, low, high, going)
        if bool((going & ~is_found).any()):
            scaled = -diagonal * wanted
            other, is_other = projected_search(hessians, d, residual, scaled, low, high, going & ~is_found)
            moved, is_found = xp.where(is_other[:, None], other, moved), is_found | is_other
        going = going & is_found
        d = xp.where(going[:, None], moved, d)
        residual = grads + multiply(hessians, d)
    return d


def clamp(vectors: Array, low: Array, high: Array) -> Array:
    """Vectors with their entries between limits."""
    xp: Any = library(vectors)
    return xp.minimum(xp.maximum(vectors, low), high)


def solve_free(matrices: Array, vectors: Array, free: Array) -> Array:
    """Solutions x of (A x)_i = v_i for the free i, where the other x_i are 0; not finite where A is singular."""
    both = free[:, :, None] & free[:, None, :]
    reduced = library(vectors).where(both, matrices, identity(vectors))
    solution, _ = torch.linalg.solve_ex(tensor_of(reduced), tensor_of(vectors)[:, :, None])
    return array_of(solution[:, :, 0])


def projected_search(
    hessians: Array, d: Array, residual: Array, step: Array, low: Array, high: Array, where: Array
) -> tuple[Array, Array]:
    """The first of d + step, d + step / 2, ... whose projection lowers the model enough; and where there is one."""
    xp: Any = library(d)
    end, is_found = d, ~where
    for _ in range(HALVINGS):
        moved = clamp(d + step, low, high)
        change = moved - d
        slope, bend = row_products(residual, change), row_products(change, multiply(hessians, change))
        is_new = ~is_found & (slope < 0) & (slope + 0.5 * bend <= 1e-4 * slope)
        end, is_found = xp.where(is_new[:, None], moved, end), is_found | is_new
        if bool(is_found.all()):
            break
        step = step / 2
    return end, is_found & where


def max_feasible_steps(directions: Array, low: Array, high: Array) -> Array:
    """The largest steps along directions that stay between low and high, at least 1; (K,)."""
    xp: Any = library(directions)
    limits = abs(xp.where(directions > 0, high, xp.where(directions < 0, low, math.inf)) / directions)
    nearest = array_of(tensor_of(limits).amin(1).double())
    return xp.where(nearest > 1.0, nearest, 1.0)
