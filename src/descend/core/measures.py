"""What a step measures on its way: sums over each parameter, and who is told of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from descend.core.checks import is_sequence
from descend.core.signature import signature

# Sums over the elements of a parameter. Squares: of the gradient as it is stored, of the change of the stored
# parameter, of the parameter before it. ``ratio``: |exp_avg| / sqrt(exp_avg_sq) after it, where the latter is
# positive; ``ratios``: at how many elements it is. Counts: elements whose gradient is not zero; those among them whose
# stored value stays the same; NaN and Inf in the gradient, and in the parameter after the step.
COLUMNS = ("grad_sq", "update_sq", "weight_sq", "ratio", "ratios", "moving", "lost", "bad_grads", "bad_weights")


class Part(NamedTuple):
    """What was measured of parameters that share a rule and dtypes.

    Attributes:
        params: the parameters, as their groups list them.
        sums: a row a parameter, its columns are ``COLUMNS``, float64; on the parameters' device.
        scale: what stored gradients were multiplied by to undo a loss scale.
        corrections: for each parameter, what removes the averages' bias from ``ratio``.
        rows: how many rows the gradient named, if it was sparse; a tensor of shape () if the device counts them.
    """

    params: Sequence[Tensor]
    sums: np.ndarray | Tensor
    scale: float
    corrections: np.ndarray
    rows: int | Tensor | None = None


class Sample:
    """What one step measures; each update adds its part.

    Attributes:
        scale: what stored gradients are multiplied by to undo a loss scale.
        parts: in the order of the updates; if a parameter is in several, the last counts.
    """

    def __init__(self) -> None:
        self.scale = 1.0
        self.parts: list[Part] = []

    def add(
        self,
        params: Sequence[Tensor],
        sums: np.ndarray | Tensor,
        corrections: np.ndarray,
        rows: int | Tensor | None = None,
    ) -> None:
        """Add a part, see ``Part``."""
        self.parts.append(Part(params, sums, self.scale, corrections, rows))


class Observer(ABC):
    """Is told of every step of an optimizer, and may ask for what a step measures."""

    @abstractmethod
    def begin(self, scale: float, coefficient: float) -> Sample | None:
        """Called when parameters are about to step: all of them, or inside backward one by one.

        Args:
            scale: what stored gradients are multiplied by to undo a loss scale.
            coefficient: of clipping.
        Returns:
            What the step shall fill in; None if it shall measure nothing.
        """

    @abstractmethod
    def skip(self, names: Sequence[str]) -> None:
        """Called when a step is left out; with the parameters whose gradients have a NaN or Inf, if they are known."""

    @abstractmethod
    def end_step(self) -> None:
        """Called when a step is complete, has been left out, or has failed, before or after ``begin``."""


def moments(rule: Callable[..., Any]) -> tuple[int, int] | None:
    """Positions of Adam's two averages among the state tensors of ``rule``; None if it does not have both."""
    state = signature(rule).state
    return (state.index("exp_avg"), state.index("exp_avg_sq")) if {"exp_avg", "exp_avg_sq"} <= {*state} else None


def correction(rule: Callable[..., Any], group: Mapping[str, Any], step: float) -> float:
    """What removes the bias of Adam's averages after their ``step``-th step from |exp_avg| / sqrt(exp_avg_sq).

    It is 1 where that is not known: a rule of a user's may have ``betas`` that are not two, and mean something else.
    """
    betas: Any = group.get("betas")
    if moments(rule) is None or not is_sequence(betas, 2):
        return 1.0
    bias1, bias2 = (1 - float(beta) ** step for beta in betas)
    return math.sqrt(bias2) / bias1 if bias1 > 0 and bias2 > 0 else 1.0
