"""Conditions on options that several optimizers share, with torch's error texts."""

from __future__ import annotations

from collections.abc import Mapping, Set
from numbers import Real
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def check_at_least_zero(optimizer: Optimizer, what: str, name: str, value: Any) -> None:
    """Raise torch's error if an option is negative, NaN or no number at all."""
    try:
        valid = bool(value >= 0)
    except (TypeError, RuntimeError, ValueError):  # of several numbers, too
        valid = False
    if not valid:
        raise ValueError(f"Invalid {what}: {value} ({type(optimizer).__name__}: {name} must be a number >= 0)")


def check_lr(optimizer: Optimizer, options: Mapping[str, Any]) -> None:
    """Raise torch's errors for a learning rate that is negative, NaN or a tensor of several elements."""
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element ({type(optimizer).__name__}: got shape {tuple(lr.shape)})")
    check_at_least_zero(optimizer, "learning rate", "lr", lr)


def check_pair(optimizer: Optimizer, name: str, value: Any) -> None:
    """Raise ``ValueError`` unless an option holds two numbers in an order, in a tuple, a list or an array."""
    try:
        is_pair = len(value) == 2 and not isinstance(value, str | bytes | Set | Mapping)
    except TypeError:  # a number, None, a generator
        is_pair = False
    if not is_pair:
        raise ValueError(f"{type(optimizer).__name__}: {name} must be two numbers, got {value!r}.")
    for entry in value:
        if not isinstance(entry, Real | Tensor):
            raise ValueError(f"{type(optimizer).__name__}: {name} must be two numbers, got {entry!r} among them.")


def check_betas(optimizer: Optimizer, betas: Any) -> None:
    """Raise torch's error unless both are in [0, 1)."""
    check_pair(optimizer, "betas", betas)
    for index, beta in enumerate(betas):
        if not 0 <= beta < 1:
            name = type(optimizer).__name__
            raise ValueError(
                f"Invalid beta parameter at index {index}: {beta} ({name}: betas[{index}] must be in [0, 1))"
            )


def check_eps(optimizer: Optimizer, options: Mapping[str, Any]) -> None:
    """Raise torch's error for a negative ``eps``."""
    check_at_least_zero(optimizer, "epsilon value", "eps", options["eps"])


def check_values(optimizer: Optimizer, options: Mapping[str, Any], *names: str) -> None:
    """Raise torch's error for a negative option among ``names``."""
    for name in names:
        check_at_least_zero(optimizer, f"{name} value", name, options[name])


def check_flags(options: Mapping[str, Any]) -> None:
    """Raise torch's errors for flags that exclude each other."""
    if options["fused"] and options["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`; leave one of them out.")
    if options["fused"] and options["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
