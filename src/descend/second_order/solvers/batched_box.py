"""The quadratic models of many problems with bounds, and the directions to their minimizers in the boxes.

A problem gets its Hessian as a dense matrix, one problem after the other in compiled code. If it has many variables,
it gets one only where a bound is in the way of the step of L-BFGS without bounds. Models are in the host's memory,
whatever the device of the problems.
"""

from __future__ import annotations

import numpy as np
import torch

from descend.backends.cpu import loops
from descend.second_order.mathematics import dense_box
from descend.second_order.mathematics.arrays import cast, on_device_of, on_host, tensor_of
from descend.second_order.mathematics.batched_directions import CompactInverses, Histories
from descend.second_order.mathematics.space import Array
from descend.second_order.solvers.batched_lines import run_in_python

LITTLE = 1000  # problems times variables squared, for which no compiler is loaded
SMALL = 32  # variables, up to which a dense Hessian costs little more than the step without bounds
PARTS = 4  # into which each thread's problems are divided, because they need unequal times
SCRATCH = 2**27  # numbers of scratch memory for all parts
WORK = 100  # elements of a long vector that take as long as one variable


class BoxedModels:
    """L-BFGS Hessians of K problems, and their minimizers between bounds.

    Args:
        like: the points, (K, n).
        history_size: pairs kept, >= 1.
    """

    def __init__(self, like: Array, history_size: int) -> None:
        count, numel = like.shape
        # A variable that stayed on its bound says nothing about its scale, although its part of y is not zero.
        kind = CompactInverses if numel > SMALL else Histories
        self.learned = kind(np.empty((count, numel)), history_size, learns_from_all=False)
        self._like = like
        self._is_compiled = count * (numel + 4) ** 2 > LITTLE  # and stays so when few problems are left
        size = dense_box.scratch_size(numel)
        parts = min(PARTS * torch.get_num_threads(), SCRATCH // max(1, size) + 1)
        self._scratch = np.empty((parts, size))

    @property
    def is_steepest(self) -> Array:
        """Where nothing has been learned, (K,)."""
        return on_device_of(self._like, self.learned.is_steepest)

    def reset(self, rows: Array) -> None:
        """Forget what was learned in some problems."""
        self.learned.reset(tensor_of(rows).cpu().numpy())

    def keep(self, rows: Array) -> None:
        """Forget all problems but these."""
        self.learned.keep(tensor_of(rows).cpu().numpy())

    def update(self, rows: Array, s: Array, y: Array) -> None:
        """Learn in some problems that the gradient changed by y along s, where s'y > 0; rows of s and y are theirs."""
        self.learned.update(tensor_of(rows).cpu().numpy(), *on_host(s, y))

    def directions(
        self, where: Array, x: Array, grad: Array, lower: Array, upper: Array, lengths: Array
    ) -> tuple[Array, Array]:
        """Directions to the minimizers, (K, n), and the largest steps along them inside the bounds, at least 1; (K,).

        Args:
            where: which problems need one, (K,).
            x, grad, lower, upper: points, gradients and bounds, (K, n).
            lengths: of the gradient to go where nothing has been learned, (K,).
        """
        (needed, first), vectors, learned = on_host(where, lengths), on_host(x, grad, lower, upper), self.learned
        directions, ends = np.full(grad.shape, np.nan), np.ones(len(grad))
        if isinstance(learned, CompactInverses):
            directions = learned.directions(vectors[1])
        pairs = learned.steps, learned.changes, learned.curvatures, learned.count.astype(np.float64)
        arrays = directions, ends, needed, first, *vectors, learned.diagonal, *pairs
        if self._is_compiled:
            scratch = self._scratch[: len(grad)]
            loops.run_in_parts(dense_box.box_directions, arrays, scratch, WORK * learned.diagonal.size)
        else:
            run_in_python(dense_box.box_directions, *arrays, self._scratch[0])
        return cast(on_device_of(grad, directions), grad), on_device_of(grad, ends)
