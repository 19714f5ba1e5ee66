"""Conditions on options that several optimizers share, with torch's error texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def check_at_least_zero(optimizer: Optimizer, what: str, name: str, value: Any) -> None:
    """Raise torch's error if an option is negative, NaN or no number at all."""
    try:
        valid = bool(value >= 0)
    except (TypeError, RuntimeError):
        valid = False
    if not valid:
        raise ValueError(f"Invalid {what}: {value} ({type(optimizer).__name__}: {name} must be a number >= 0)")


def check_lr(optimizer: Optimizer, options: Mapping[str, Any]) -> None:
    """Raise torch's errors for a learning rate that is negative, NaN or a tensor of several elements."""
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element ({type(optimizer).__name__}: got shape {tuple(lr.shape)})")
    check_at_least_zero(optimizer, "learning rate", "lr", lr)
