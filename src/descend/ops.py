"""The only functions that a rule may call.

The versions here act on tensors and plain numbers. A compiled backend rebinds the names to its own versions, see
``backends/retarget.py``. Arithmetic and comparison operators need no entry: they mean the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["abs", "exp", "log", "maximum", "minimum", "sign", "sqrt", "where"]  # of rules of elements

Rule = TypeVar("Rule", bound=Callable[..., Any])


def of_matrices(rule: Rule, state: int | None = None, stacked: Callable[[], Rule] | None = None) -> Rule:
    """Mark a rule as one of whole matrices, which no backend may cut into elements, chunks or rows.

    Args:
        rule: the rule.
        state: how many state tensors it takes. Default: found out by running it on matrices of shape (1, 1).
        stacked: gives the same rule for tensors with one more leading dimension, over which several parameters of equal
            shape are a batch.
    """
    rule.kind, rule.state, rule.stacked = "matrix", state, stacked  # type: ignore[attr-defined]
    return rule


def elementwise(function: Callable[..., Any], *args: Any, replaces: int = 0) -> Any:
    """``function(*args)``, for a function that acts on each element by itself: a part of a rule of matrices.

    A backend may call it with a piece of the tensors at a time, which stay in the cache.

    Args:
        function: takes tensors of equal shapes, first of all; and numbers, also as tensors of one element.
        args: its arguments.
        replaces: so many results are new values of the first arguments, in their order. The rule does not use the old
            ones again, and a backend may write the new ones over them.
    """
    return function(*args)


def _on_cpu(number: float, dtype: torch.dtype) -> Tensor:
    """A number as a tensor that every device takes, whatever ``torch.set_default_device`` says."""
    return torch.tensor(number, dtype=dtype, device="cpu")


def _unary(on_tensor: Callable[[Tensor], Tensor], on_number: Callable[[float], float]) -> Any:
    def op(x: Any) -> Any:
        return on_tensor(x) if isinstance(x, Tensor) else on_number(x)

    return op


def _binary(on_tensors: Callable[[Tensor, Tensor], Tensor]) -> Any:
    def op(a: Any, b: Any) -> Any:
        # By default torch.tensor makes a number float32, which loses half of its digits.
        dtype = next((x.dtype for x in (a, b) if isinstance(x, Tensor)), torch.float64)
        return on_tensors(*(x if isinstance(x, Tensor) else _on_cpu(x, dtype) for x in (a, b)))

    return op


abs = _unary(torch.abs, math.fabs)
exp = _unary(torch.exp, math.exp)
log = _unary(torch.log, math.log)
sqrt = _unary(torch.sqrt, math.sqrt)
sign = _unary(torch.sign, lambda x: math.copysign(1.0, x) if x else 0.0)
maximum = _binary(torch.maximum)  # NaN in either argument gives NaN
minimum = _binary(torch.minimum)


def where(condition: Any, a: Any, b: Any) -> Any:
    """Return ``a`` where ``condition`` holds and ``b`` elsewhere."""
    if not isinstance(condition, Tensor):
        return a if condition else b
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        # Filled in on the device: torch.where would copy a CPU tensor there, and wait. Apple's GPUs have no float64.
        wide = torch.float32 if condition.device.type == "mps" else torch.float64
        a = condition.new_full((), a, dtype=wide)
    return torch.where(condition, a, b)
