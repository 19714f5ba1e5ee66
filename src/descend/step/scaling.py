"""Loss scaling: what a ``GradScaler`` tells an optimizer made with ``amp="fused"``."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from descend.core.memory import is_on_device
from descend.core.optimizer import MethodOptimizer


class LossScale(NamedTuple):
    """What the loss was multiplied by, and whether that made a gradient overflow.

    Attributes:
        grad_scale: a number > 0; or a tensor of one element on a device.
        found_inf: a tensor of one element on a device, not 0 after an overflow; None if there was none.
    """

    grad_scale: float | Tensor = 1.0
    found_inf: Tensor | None = None


UNSCALED = LossScale()


def is_scaled(optimizer: MethodOptimizer) -> bool:
    """Whether a ``GradScaler``, or the user, has said by what the loss was multiplied."""
    return "grad_scale" in optimizer.__dict__ or "found_inf" in optimizer.__dict__


def refuse_closure(optimizer: MethodOptimizer) -> None:
    """Raise if a ``GradScaler`` calls: the closure would make new gradients after it has looked at the old ones."""
    if "found_inf" in optimizer.__dict__:
        raise RuntimeError(
            f"{type(optimizer).__name__}: GradScaler has checked the gradients before the closure makes new ones. Call "
            "the closure first, then scaler.step(optimizer) without it. Nothing has moved."
        )


def forget_scale(optimizer: MethodOptimizer) -> None:
    """Do what a ``GradScaler`` does after a ``step``, unless it raised: the next scale would be multiplied by this."""
    if "found_inf" in optimizer.__dict__:
        optimizer.__dict__.pop("grad_scale", None)
        del optimizer.__dict__["found_inf"]


def loss_scale(optimizer: MethodOptimizer) -> LossScale | None:
    """What the loss was multiplied by, as far as the host knows it without waiting; None if a gradient overflowed."""
    if not is_scaled(optimizer):
        return UNSCALED
    if optimizer.options.amp is None:
        raise RuntimeError(
            f"{type(optimizer).__name__}: grad_scale and found_inf are read by optimizers made with amp='fused', this "
            "one was not. Nothing has moved."
        )
    given: Any = optimizer.__dict__.get("grad_scale")
    return _known(
        optimizer, LossScale(1.0 if given is None else given, optimizer.__dict__.get("found_inf")), waits=False
    )


def wait_for(optimizer: MethodOptimizer, scale: LossScale) -> LossScale | None:
    """The same in numbers: the host waits for devices. None if a gradient overflowed."""
    return _known(optimizer, scale, waits=True)


def _known(optimizer: MethodOptimizer, scale: LossScale, waits: bool) -> LossScale | None:
    """Turn into numbers what is on the host, or everything."""
    grad_scale, found_inf = scale
    if found_inf is not None and (waits or not is_on_device(found_inf)):
        if float(found_inf) != 0:
            return None
        found_inf = None
    if waits or not is_on_device(grad_scale):
        grad_scale = float(grad_scale)
        if not 0 < grad_scale < math.inf:
            name = type(optimizer).__name__
            raise ValueError(f"{name}: grad_scale must be a number > 0, got {grad_scale}. Nothing has moved.")
    return LossScale(grad_scale, found_inf)
