"""The quadratic models of many problems with bounds, and the directions to their minimizers in the boxes.

Each problem's Hessian is a dense matrix that exists while its direction is computed, one problem after the other in
compiled code. The pairs are in the host's memory, whatever the device of the problems.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from descend.backends.cpu import loops
from descend.second_order.mathematics import dense_box
from descend.second_order.mathematics.arrays import cast, keep, on_device_of, on_host, row_products, tensor_of
from descend.second_order.mathematics.batched_directions import learned_diagonals
from descend.second_order.mathematics.space import Array
from descend.second_order.solvers.batched_lines import run_in_python

LITTLE = 1000  # problems times variables squared, for which no compiler is loaded
PARTS = 4  # into which each thread's problems are divided, because they need unequal times
WORK = 100  # elements of a long vector that take as long as one variable


class BoxedModels:
    """L-BFGS Hessians of K problems, with diagonals that learn the scale of each variable.

    As ``solvers/box.py`` has them for one problem; a batch that few problems are left of stays compiled.

    Args:
        like: the points, (K, n).
        history_size: pairs kept, >= 1.
    """

    _ARRAYS: ClassVar = ("count", "steps", "changes", "diagonal", "curvatures")

    def __init__(self, like: Array, history_size: int) -> None:
        count, numel = like.shape
        self.history_size = history_size
        self.count = np.zeros(count, np.int64)  # pairs taken so far
        self.steps = np.zeros((count, history_size, numel))
        self.changes = np.zeros((count, history_size, numel))
        self.diagonal = np.ones((count, numel))
        self.curvatures = np.ones((count, history_size))
        self._like = like
        self._is_compiled = count * (numel + 4) ** 2 > LITTLE
        self._scratch = np.empty((PARTS * torch.get_num_threads(), dense_box.scratch_size(numel)))

    @property
    def is_steepest(self) -> Array:
        """Where nothing has been learned, (K,)."""
        return on_device_of(self._like, self.count == 0)

    def reset(self, rows: Array) -> None:
        """Forget what was learned in some problems."""
        places = tensor_of(rows).cpu().numpy()
        self.count[places], self.diagonal[places] = 0, 1.0

    def keep(self, rows: Array) -> None:
        """Forget all problems but these."""
        keep(self, self._ARRAYS, tensor_of(rows).cpu().numpy())

    def update(self, rows: Array, s: Array, y: Array) -> None:
        """Learn in some problems that the gradient changed by y along s, where s'y > 0; rows of s and y are theirs."""
        places = tensor_of(rows).cpu().numpy()
        s, y = on_host(s, y)
        slots = self.count[places] % self.history_size
        scale = row_products(s, y)[:, None] ** -0.5
        s, y = scale * s, scale * y
        # A variable that stayed on its bound says nothing about its scale, although its part of y is not zero.
        moved = np.where(s != 0, y, 0.0)
        self.diagonal[places], self.curvatures[places, slots] = learned_diagonals(self.diagonal[places], s, moved)
        self.steps[places, slots], self.changes[places, slots] = s, y
        self.count[places] += 1

    def directions(
        self, where: Array, x: Array, grad: Array, lower: Array, upper: Array, lengths: Array
    ) -> tuple[Array, Array]:
        """Directions to the minimizers, (K, n), and the largest steps along them inside the bounds, at least 1; (K,).

        Args:
            where: which problems need one, (K,).
            x, grad, lower, upper: points, gradients and bounds, (K, n).
            lengths: of the gradient to go where nothing has been learned, (K,).
        """
        (needed, first), vectors = on_host(where, lengths), on_host(x, grad, lower, upper)
        directions, ends = np.zeros(grad.shape), np.ones(len(grad))
        models = self.diagonal, self.steps, self.changes, self.curvatures, self.count.astype(np.float64)
        arrays = directions, ends, needed, first, *vectors, *models
        if self._is_compiled:
            scratch = self._scratch[: len(grad)]
            loops.run_in_parts(dense_box.box_directions, arrays, scratch, WORK * self.diagonal.size)
        else:
            run_in_python(dense_box.box_directions, *arrays, self._scratch[0])
        return cast(on_device_of(grad, directions), grad), on_device_of(grad, ends)
