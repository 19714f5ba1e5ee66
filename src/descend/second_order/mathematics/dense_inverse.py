"""Descent directions from a dense inverse Hessian, which learns from steps and changes of the gradient.

Letters are those of ``directions``. Three products are brought from the vectors' device at each update; the rest stays
there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from descend.second_order.mathematics.broyden_family import Choice, Member, Ratios, bfgs
from descend.second_order.mathematics.diagonal import Pair
from descend.second_order.mathematics.directions import CompactInverse, add_symmetric_
from descend.second_order.mathematics.space import Array

BEGINNING = 20  # pairs before the matrix is dense


class DenseInverse:
    """The inverse Hessian as a dense matrix, by updates of Broyden's family; O(numel**2) memory and time.

    The first ``history_size`` pairs are those of a ``CompactInverse``, whose diagonal learns the scale of each variable
    meanwhile; then its matrix is written out, and updated from there on. In that part a pair whose products are no
    positive numbers is not learned.

    Args:
        numel: length of the vectors.
        dtype, device: theirs, and the matrix's.
        choose: the member of the family. Default: BFGS.
        history_size: number of pairs before the matrix is dense, >= 1. Default: 20.
    Source: the module ``broyden_family``.
    """

    def __init__(
        self, numel: int, dtype: torch.dtype, device: torch.device, choose: Choice = bfgs, history_size: int = BEGINNING
    ) -> None:
        self.choose = choose
        self.beginning = CompactInverse(numel, history_size, dtype, device)
        self.inverse = torch.empty(numel, numel, dtype=dtype, device=device)
        self.line: tuple[Tensor, Tensor] | None = None  # the newest gradient, and the direction there

    @property
    def is_steepest(self) -> bool:
        return self.beginning.is_steepest

    @property
    def is_dense(self) -> bool:
        return self.beginning.count == self.beginning.history_size

    def matrix(self) -> Tensor:
        """The inverse Hessian as a matrix, not to be changed; that of the beginning is written out for it."""
        if not self.is_dense:
            self.beginning.write_to(self.inverse)
        return self.inverse

    def measure(self, s: Tensor, y: Tensor) -> Sequence[Array]:
        return ()

    def update(self, s: Tensor, y: Tensor, pair: Pair | None = None) -> None:
        """Learn that the gradient changed by y along s, a step in the newest direction.

        Where no direction was asked for since the last update, s'B s is unknown, and the update is that of BFGS.
        """
        if self.is_dense:
            self._update(s, y)
        else:
            self.beginning.update(s, y)
            if self.is_dense:
                self.beginning.write_to(self.inverse)

    def _update(self, s: Tensor, y: Tensor) -> None:
        hy = self.inverse.mv(y)
        sy, yhy, sbs = self._products(s, y, hy)
        if not (0 < sy < math.inf and 0 < yhy < math.inf):
            return
        b, h = sbs / sy, yhy / sy
        theta, sigma, tau = self.choose(Ratios(b, h, len(s))) if 0 < b * h < math.inf else Member()
        phi = (1 - theta) / sigma
        # The update as [s, H y] M [s, H y]' with a symmetric matrix M of 2 x 2.
        ss, sh, hh = (phi * h / tau + 1) / sy, -phi / tau / sy, (phi - 1) / tau / yhy
        add_symmetric_(self.inverse, 1 / tau, torch.stack([s, hy]), torch.stack([ss * s + sh * hy, sh * s + hh * hy]))

    def _products(self, s: Tensor, y: Tensor, hy: Tensor) -> list[float]:
        """s'y, y'H y and s'B s in one transfer from the device; NaN for the last one if it is unknown."""
        products = [s.dot(y), y.dot(hy)]
        if self.line is not None:  # s = t d and d = -H grad, so that B s = -t grad
            grad, direction = self.line
            products.append(-s.dot(grad) * s.dot(direction) / direction.dot(direction))
            self.line = None
        values: list[float] = torch.stack(products).tolist()
        return values if len(values) == 3 else [*values, math.nan]

    def direction(self, grad: Tensor, largest: float | None = None) -> Tensor:
        if not self.is_dense:
            return self.beginning.direction(grad, largest)
        direction = self.inverse.mv(grad).neg_()
        self.line = grad, direction
        return direction

    def reset(self) -> None:
        self.beginning.reset()
        self.line = None
