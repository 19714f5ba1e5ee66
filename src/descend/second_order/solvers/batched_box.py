"""Directions of many problems with bounds: minimizers of their quadratic models in their boxes.

Most steps stay away from the bounds. Those are steps of L-BFGS without bounds, and cost no more. Only where a bound is
in the way does a problem get its Hessian as a dense matrix, one problem after the other in compiled code.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from descend.backends.cpu import loops
from descend.second_order.mathematics import dense_box
from descend.second_order.mathematics.arrays import cast, on_device_of, on_host
from descend.second_order.mathematics.batched_directions import CompactInverses
from descend.second_order.mathematics.space import Array
from descend.second_order.solvers.batched_lines import run_in_python

LITTLE = 1000  # work, in problems times variables squared, for which no compiler is loaded


def runner(count: int, numel: int) -> Callable[..., None]:
    """What runs ``box_directions`` for so many problems of so many variables, or for what is left of them."""
    return loops.run if count * (numel + 4) ** 2 > LITTLE else run_in_python


def box_directions(
    run: Callable[..., None],
    inverses: CompactInverses,
    directions: Array,
    grads: Array,
    low: Array,
    high: Array,
    where: Array,
) -> tuple[Array, Array]:
    """Directions that respect the bounds, (K, n), and the largest steps along them, at least 1; (K,).

    Args:
        run: a ``runner``.
        inverses: the models.
        directions: minimizers without bounds; where nothing has been learned, steps along the gradient in the box.
        grads: (K, n).
        low, high: the bounds, relative to the point: low <= 0 <= high; (K, n).
        where: which problems need a direction, (K,).
    """
    count, numel = grads.shape
    (needed, counts), ends = on_host(where, inverses.count), np.ones(count)
    wanted = directions, grads, low, high, inverses.diagonal, inverses.steps, inverses.changes, inverses.curvatures
    vectors = [on_host(array)[0] for array in wanted]
    scratch = np.empty(dense_box.scratch_size(numel))
    run(dense_box.box_directions, vectors[0], ends, needed, *vectors[1:], counts, scratch)
    return cast(on_device_of(grads, vectors[0]), grads), on_device_of(grads, ends)
