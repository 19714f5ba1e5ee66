"""Whether optimizers that were timed have taken the same steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from descend.bench.contenders import enter
from descend.bench.methods import OURS, Method

DISTANCE = 0.01
"""How far apart two optimizers may end, as a share of the way they went."""


class Disagreement:
    """Compares parameters after so many steps with those of an untimed optimizer of ours that takes as many.

    Args:
        method: which optimizer.
        values: start of the parameters, and value of the gradients.
        max_norm: limit of the gradients' joint norm; None not to clip.
    """

    def __init__(self, method: Method, values: Sequence[Tensor], max_norm: float | None) -> None:
        self._values = values
        self._params, _, self._contender = enter(OURS, method, values, max_norm, fresh=False)
        self._steps = 0

    def after(self, steps: int, params: Sequence[Tensor]) -> float:
        """Return the distance to ``params``, in units of what is allowed: more than 1 is a disagreement.

        Allowed are a hundredth of the way that the parameters went, and a rounding of each number in each step.

        Args:
            steps: how many led to ``params``; not fewer than in the call before.
            params: of another optimizer.
        """
        self._contender.run(steps - self._steps)
        self._steps = steps
        with torch.no_grad():
            apart = _norm(self._params, params)
            moved = _norm(self._params, self._values)
            rounded = steps * math.hypot(*(torch.finfo(each.dtype).eps * _length(each) for each in self._params))
        distance = apart / max(DISTANCE * moved + rounded, torch.finfo(torch.float64).tiny)
        return distance if math.isfinite(distance) else math.inf


def _norm(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return math.hypot(*(_length(x - y) for x, y in zip(a, b, strict=True)))


def _length(tensor: Tensor) -> float:
    wide = torch.float64 if not tensor.is_complex() else torch.complex128
    return float(torch.linalg.vector_norm(tensor, dtype=wide))
