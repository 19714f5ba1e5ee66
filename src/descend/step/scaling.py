"""Loss scaling: what a ``GradScaler`` tells an optimizer made with ``amp="fused"``."""

from __future__ import annotations

import math
from typing import Any

from descend.core.method import Method


def is_scaled(method: Method) -> bool:
    """Whether a ``GradScaler``, or the user, has said by what the loss was multiplied."""
    return "grad_scale" in method.__dict__ or "found_inf" in method.__dict__


def refuse_closure(method: Method) -> None:
    """Raise if a ``GradScaler`` calls: the closure would make new gradients after it has looked at the old ones."""
    if "found_inf" in method.__dict__:
        raise RuntimeError(
            f"{type(method).__name__}: GradScaler has checked the gradients before the closure makes new ones. Call "
            "the closure first, then scaler.step(optimizer) without it. Nothing has moved."
        )


def forget_scale(method: Method) -> None:
    """Do what a ``GradScaler`` does after a ``step``, unless it raised: the next scale would be multiplied by this."""
    if "found_inf" in method.__dict__:
        method.__dict__.pop("grad_scale", None)
        del method.__dict__["found_inf"]


def gradient_scale(method: Method) -> float | None:
    """One over what the loss was multiplied by; None if that made a gradient overflow."""
    if not is_scaled(method):
        return 1.0
    name = type(method).__name__
    if method.options.amp is None:
        raise RuntimeError(
            f"{name}: grad_scale and found_inf are read by optimizers made with amp='fused', this one was not. "
            "Nothing has moved."
        )
    found_inf: Any = method.__dict__.get("found_inf")
    if found_inf is not None and float(found_inf) != 0:
        return None
    given: Any = method.__dict__.get("grad_scale")
    grad_scale = 1.0 if given is None else float(given)
    if not 0 < grad_scale < math.inf:
        raise ValueError(f"{name}: grad_scale must be a number > 0, got {grad_scale}. Nothing has moved.")
    return 1 / grad_scale
