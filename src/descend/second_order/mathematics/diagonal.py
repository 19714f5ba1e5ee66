"""A diagonal inverse Hessian that learns the scale of each variable from steps and changes of the gradient.

s = x_new - x, y = grad_new - grad, D the diagonal. NumPy arrays and tensors go through the same formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from descend.second_order.mathematics.space import Array, Space, distance_of_samples

SPREAD = 1e3  # entries of the diagonal stay within this factor of their median
LEAST_COSINE = 1e-12  # of the angle between s and y, in the metric of the diagonal


class Pair(NamedTuple):
    """Inner products of s and y, over all ranks, in the metric of a diagonal D; and samples of all three vectors."""

    y_dy: Any
    s_ds: Any
    curvature: Any  # s'y
    diagonal: Array
    s: Array
    y: Array

    def scaled(self, s_factor: Any, y_factor: Any) -> Pair:
        """That of s and y multiplied by factors."""
        return Pair(
            self.y_dy * (y_factor * y_factor),
            self.s_ds * (s_factor * s_factor),
            self.curvature * (s_factor * y_factor),
            self.diagonal,
            self.s * s_factor,
            self.y * y_factor,
        )


@np.errstate(all="ignore")
def measure(diagonal: Array, s: Array, y: Array, space: Space) -> Sequence[Array]:
    """What this rank adds to the ``Pair`` of s and y; nothing where no other rank holds entries."""
    if not space.is_shared:
        return ()
    return [(diagonal * y).dot(y), (s / diagonal).dot(s), s.dot(y), *space.samples(diagonal, s, y)]


def learn_diagonal_(diagonal: Array, s: Array, y: Array, work: Array = None, pair: Pair | None = None) -> Any:
    """Update a diagonal inverse Hessian in place by a pair; return s'y.

    ``work``: two vectors of scratch memory, for tensors; None to allocate them. ``pair``: where ranks share the
    vectors, of which these are parts.

    The diagonal is scaled so that y'D y = s'y, then replaced by the diagonal of the BFGS update. s'y is raised to
    ``LEAST_COSINE`` where rounding has made it smaller.

    Source: Gilbert & Lemaréchal 1989, section 4.2, https://doi.org/10.1007/BF01589113, scaled as in M1QN3.
    """
    if work is None:
        growth, shrinkage = diagonal * y, s / diagonal
    else:
        growth, shrinkage = torch.mul(diagonal, y, out=work[0]), torch.div(s, diagonal, out=work[1])
    if pair is None:
        y_dy, s_ds, curvature = growth.dot(y), shrinkage.dot(s), s.dot(y)
    else:
        y_dy, s_ds, curvature = pair[:3]
    curvature = raised(curvature, y_dy, s_ds)
    _update_diagonal_(diagonal, s, y, growth, shrinkage, y_dy, s_ds, curvature)
    if pair is None:
        least, most = limits(diagonal[:: distance_of_samples(len(diagonal))])
    else:
        least, most = limits_after(pair, curvature)
    if isinstance(diagonal, np.ndarray):
        np.minimum(np.maximum(diagonal, least, out=diagonal), most, out=diagonal)
    else:
        torch.clamp(diagonal, least, most, out=diagonal)
    return curvature


def raised(curvature: Any, y_dy: Any, s_ds: Any) -> Any:
    """s'y, raised where rounding has made it too small; without a branch, which would wait for a GPU."""
    least = LEAST_COSINE * y_dy**0.5 * s_ds**0.5
    return curvature + (least - curvature) * (curvature < least)


def limits_after(pair: Pair, curvature: Any) -> tuple[Any, Any]:
    """The limits of the updated diagonal, from the pair's samples: every rank updates them, and has their median."""
    sample, growth, shrinkage = pair.diagonal, pair.diagonal * pair.y, pair.s / pair.diagonal
    _update_diagonal_(sample, pair.s, pair.y, growth, shrinkage, pair.y_dy, pair.s_ds, curvature)
    return limits(sample)


def limits(sample: Array) -> tuple[Any, Any]:
    """Least and largest entry of a diagonal, from the median of some of its entries."""
    if isinstance(sample, np.ndarray):
        middle = np.partition(sample, (len(sample) - 1) // 2)[(len(sample) - 1) // 2]
    else:
        middle = sample.median()
    return middle / SPREAD, middle * SPREAD


def _update_diagonal_(
    diagonal: Array, s: Array, y: Array, growth: Array, shrinkage: Array, y_dy: Any, s_ds: Any, curvature: Any
) -> None:
    """Scale a diagonal and take that of the BFGS update; ``growth`` is D y and ``shrinkage`` D^-1 s, overwritten."""
    growth *= y
    growth /= y_dy
    shrinkage *= s
    shrinkage /= s_ds
    growth -= shrinkage
    growth += 1.0
    diagonal *= curvature / y_dy
    diagonal /= growth
