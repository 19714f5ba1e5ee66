"""Checks of options that several optimizers share, in torch's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from descend.optimizer import FirstOrder, check_at_least_zero


def check_betas(optimizer: FirstOrder, betas: Any) -> None:
    """Raise torch's error unless all are in [0, 1)."""
    for index, beta in enumerate(betas):
        if not isinstance(beta, int | float | torch.Tensor) or not 0 <= beta < 1:
            name = type(optimizer).__name__
            raise ValueError(
                f"Invalid beta parameter at index {index}: {beta} ({name}: betas[{index}] must be in [0, 1))"
            )


def check_eps(optimizer: FirstOrder, options: Mapping[str, Any]) -> None:
    """Raise torch's error for a negative ``eps``."""
    check_at_least_zero(optimizer, "epsilon value", "eps", options["eps"])


def check_values(optimizer: FirstOrder, options: Mapping[str, Any], *names: str) -> None:
    """Raise torch's error for a negative option among ``names``."""
    for name in names:
        check_at_least_zero(optimizer, f"{name} value", name, options[name])


def check_flags(options: Mapping[str, Any]) -> None:
    """Raise torch's errors for flags that exclude each other."""
    if options["fused"] and options["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`; leave one of them out.")
    if options["fused"] and options["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
