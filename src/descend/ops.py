"""The only functions that a rule may call, and marks for rules that need sums or means.

The versions here act on tensors and plain numbers. A compiled backend rebinds the names to its own versions, see
``backends/retarget.py``. Arithmetic and comparison operators need no entry: they mean the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["abs", "exp", "log", "maximum", "minimum", "of_matrices", "sign", "sqrt", "where"]

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


def summing(part: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Mark a rule as one that needs sums over a whole tensor, or over all tensors, before it acts on elements.

    Args:
        part: ``part(param, grad, *state, *scalars)`` returns a number for each element, or a tuple of at least two;
            each is summed in float64. Its arguments are the first ones of the rule, by the same names. The rule's other
            scalars, at least one, are formed of the sums; by default they are the sums.
    Returns:
        A decorator.
    Example:
        >>> def squares(param, grad, lr):
        ...     return grad * grad
        >>> @summing(squares)
        ... def normalized(param, grad, lr, total):
        ...     return param - lr / sqrt(total) * grad
    """

    def mark(rule: Rule) -> Rule:
        rule.summed = part  # type: ignore[attr-defined]
        return rule

    return mark


def of_rows(part: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Mark a rule as one of rows: it needs the mean of something over each row before it acts on the row's elements.

    A row is what an index of the parameter's first dimension names, or the whole of a 0-dim parameter. The state is one
    number a row: tensors of shape (rows, 1).

    Args:
        part: ``part(param, grad, *state, *scalars)`` returns a number for each element. Its arguments are those of the
            rule, by the same names, without the last one, which is the mean of these numbers over the row.
    Returns:
        A decorator.
    Example:
        >>> def square(param, grad, lr):
        ...     return grad * grad
        >>> @of_rows(square)
        ... def normalized(param, grad, lr, mean_square):
        ...     return param - lr / sqrt(mean_square) * grad
        >>> from descend import from_rule
        >>> weight = torch.ones(2, 2, requires_grad=True)
        >>> optimizer = from_rule(normalized, "Normalized", lr=0.5)([weight])
        >>> (weight * torch.tensor([[3.0, -3.0], [4.0, 4.0]])).sum().backward()
        >>> optimizer.step()
        >>> weight
        tensor([[0.5000, 1.5000],
                [0.5000, 0.5000]], requires_grad=True)
    """

    def mark(rule: Rule) -> Rule:
        rule.averaged = part  # type: ignore[attr-defined]
        return rule

    return mark
