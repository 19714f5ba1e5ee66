"""The minimizer of a quadratic model in a box, with the Hessian as a dense matrix, for one problem at a time.

Written for a compiler: loops over numbers, with vectors, matrices and scratch memory as flat arrays of float64. It runs
in Python, too, on whatever has items, and slices that share memory. ``solvers/box.py`` does the same with matrices.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

INNER_ITERATIONS = 30  # projected Newton steps on the model; a few usually do
ACCURACY = 1e-2  # of the model's projected gradient, relative to its start
HALVINGS = 10
SUFFICIENT = 1e-4  # fraction of the predicted decrease of the model that a step must bring

Vector: TypeAlias = Any


def scratch_size(numel: int) -> int:
    """Numbers of scratch memory that ``minimize_in_box`` needs for so many variables."""
    return 2 * numel * numel + 8 * numel


def box_directions(
    directions: Vector,
    max_steps: Vector,
    wanted: Vector,
    lengths: Vector,
    x: Vector,
    grads: Vector,
    lower: Vector,
    upper: Vector,
    diagonals: Vector,
    steps: Vector,
    changes: Vector,
    curvatures: Vector,
    counts: Vector,
    scratch: Vector,
) -> None:
    """Turn directions of K problems into ones to the minimizers of their models between bounds.

    Args:
        directions: to the minimizers without bounds, where there are pairs, or NaN if they are not known; (K, n).
        max_steps: where to write how far the new ones stay between the bounds, at least 1; (K,).
        wanted: 0 for problems that need no direction; (K,).
        lengths: of the gradient to go where there is no pair, (K,).
        x, grads, lower, upper: points, gradients and bounds, (K, n).
        diagonals: (K, n), inverse Hessians before the pairs.
        steps, changes, curvatures, counts: pairs s and y, (K, m, n); their s'y, (K, m); and how many there have been.
        scratch: ``scratch_size`` numbers.
    """
    n, size = len(grads) // len(wanted), len(curvatures) // len(wanted)
    low, high, hessian, rest = scratch[:n], scratch[n : 2 * n], scratch[2 * n : 2 * n + n * n], scratch[2 * n + n * n :]
    for k in range(len(wanted)):
        if wanted[k] == 0:
            continue
        at, pairs, count = k * n, k * size, int(counts[k])
        d, grad, diagonal = directions[at : at + n], grads[at : at + n], diagonals[at : at + n]
        is_inside = True  # and no bound stops the negative gradient
        for i in range(n):
            low[i], high[i] = lower[at + i] - x[at + i], upper[at + i] - x[at + i]
            is_free = (low[i] < 0 or grad[i] < 0) and (high[i] > 0 or grad[i] > 0)
            is_inside = is_inside and is_free and low[i] <= d[i] <= high[i]
        if count == 0:
            for i in range(n):
                d[i] = min(max(-lengths[k] * grad[i], low[i]), high[i])
        elif not is_inside:
            s, y = steps[pairs * n : (pairs + size) * n], changes[pairs * n : (pairs + size) * n]
            write_hessian(hessian, rest, diagonal, s, y, curvatures[pairs : pairs + size], count)
            minimize_in_box(d, hessian, diagonal, grad, low, high, rest)
        max_steps[k] = max_feasible_step(d, low, high)


def max_feasible_step(direction: Vector, low: Vector, high: Vector) -> float:
    """The largest step along a direction that stays between low and high, at least 1."""
    nearest = math.inf
    for i in range(len(direction)):
        if direction[i] != 0:
            nearest = min(nearest, abs((high[i] if direction[i] > 0 else low[i]) / direction[i]))
    return max(nearest, 1.0)


def write_hessian(
    hessian: Vector, product: Vector, diagonal: Vector, steps: Vector, changes: Vector, curvatures: Vector, count: int
) -> None:
    """Write the L-BFGS Hessian: 1 / diagonal, updated by the last of ``count`` pairs, the oldest first.

    Source: Nocedal & Wright 2006, equation (6.19).
    """
    n, size = len(diagonal), len(curvatures)
    for i in range(n * n):
        hessian[i] = 0.0
    for i in range(n):
        hessian[i * n + i] = 1.0 / diagonal[i] if diagonal[i] != 0 else math.inf
    for pair in range(max(0, count - size), count):
        slot = pair % size
        s, y = steps[slot * n : (slot + 1) * n], changes[slot * n : (slot + 1) * n]
        bend, curvature = multiply(product, hessian, s), curvatures[slot]
        less, more = (1.0 / bend if bend > 0 else 0.0), (1.0 / curvature if curvature > 0 else 0.0)
        for i in range(n):
            row, along, across = hessian[i * n : (i + 1) * n], more * y[i], less * product[i]
            for j in range(n):
                row[j] += along * y[j] - across * product[j]


def multiply(product: Vector, matrix: Vector, vector: Vector) -> float:
    """Write the product of a symmetric matrix with a vector; return the inner product of the two."""
    n, inner = len(vector), 0.0
    for i in range(n):
        product[i] = 0.0
    for i in range(n):
        row, factor = matrix[i * n : (i + 1) * n], vector[i]
        for j in range(n):
            product[j] += factor * row[j]
    for i in range(n):
        inner += vector[i] * product[i]
    return inner


def minimize_in_box(
    d: Vector, hessian: Vector, diagonal: Vector, grad: Vector, low: Vector, high: Vector, scratch: Vector
) -> None:
    """Write the minimizer of grad'd + d'B d / 2 over low <= d <= high, where low <= 0 <= high.

    The steps are projected Newton steps; ``diagonal`` approximates the inverse of B.

    Source: Bertsekas 1982, https://doi.org/10.1137/0320018
    """
    n = len(grad)
    vectors, rows = scratch[: 6 * n], scratch[6 * n :]
    residual, free, step = vectors[:n], vectors[n : 2 * n], vectors[2 * n : 3 * n]
    newton, change, product = vectors[3 * n : 4 * n], vectors[4 * n : 5 * n], vectors[5 * n :]
    first = 0.0
    for i in range(n):
        d[i], residual[i] = 0.0, grad[i]
    for iteration in range(INNER_ITERATIONS):
        norm = 0.0
        for i in range(n):
            is_free = (d[i] > low[i] or residual[i] < 0) and (d[i] < high[i] or residual[i] > 0)
            free[i] = 1.0 if is_free else 0.0
            step[i] = -diagonal[i] * residual[i] if is_free else 0.0
            move = abs(d[i] - min(max(d[i] + step[i], low[i]), high[i]))
            norm = move if move > norm or move != move else norm
        first = norm if iteration == 0 else first
        if not norm > ACCURACY * first:
            return
        is_found = newton_step(newton, hessian, residual, free, rows) and projected_search(
            d, hessian, residual, newton, low, high, change, product
        )
        if not (is_found or projected_search(d, hessian, residual, step, low, high, change, product)):
            return


def newton_step(step: Vector, matrix: Vector, residual: Vector, free: Vector, rows: Vector) -> bool:
    """Write -x where (A x)_i = residual_i for the free i, and the other x_i are 0; False where A is singular.

    Elimination of symmetric rows: what is left stays symmetric, so its upper half will do.
    """
    n, size = len(residual), 0
    for i in range(n):
        if free[i] != 0:
            row, source, column = rows[size * n : (size + 1) * n], matrix[i * n : (i + 1) * n], size
            for j in range(i, n):
                if free[j] != 0:
                    row[column] = source[j]
                    column += 1
            step[size] = -residual[i]
            size += 1
    for i in range(size):
        row = rows[i * n : i * n + size]
        if row[i] == 0:
            return False
        for j in range(i + 1, size):
            other, factor = rows[j * n : j * n + size], row[j] / row[i]
            step[j] -= factor * step[i]
            for k in range(j, size):
                other[k] -= factor * row[k]
    for i in range(size - 1, -1, -1):
        row, entry = rows[i * n : i * n + size], step[i]
        for k in range(i + 1, size):
            entry -= row[k] * step[k]
        step[i] = entry / row[i]
    for i in range(n - 1, -1, -1):
        size -= 1 if free[i] != 0 else 0
        step[i] = step[size] if free[i] != 0 else 0.0
    return True


def projected_search(
    d: Vector,
    hessian: Vector,
    residual: Vector,
    step: Vector,
    low: Vector,
    high: Vector,
    change: Vector,
    product: Vector,
) -> bool:
    """Move d to the first of d + step, d + step / 2, ... whose projection lowers the model enough; False: none."""
    n, length = len(d), 1.0
    for _ in range(HALVINGS):
        slope = 0.0
        for i in range(n):
            change[i] = min(max(d[i] + length * step[i], low[i]), high[i]) - d[i]
            slope += residual[i] * change[i]
        bend = multiply(product, hessian, change)
        if slope < 0 and slope + 0.5 * bend <= SUFFICIENT * slope:
            for i in range(n):
                d[i] = min(max(d[i] + length * step[i], low[i]), high[i])
                residual[i] += product[i]
            return True
        length /= 2
    return False
