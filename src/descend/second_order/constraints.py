"""Constraints of a minimization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Constraint:
    """A condition on the argument of ``fun``, made by ``eq`` or ``ineq``.

    Attributes:
        fun: maps the argument of ``minimize``'s ``fun`` to a real tensor of any shape.
        is_equality: whether every entry is to be 0, instead of >= 0.
    """

    fun: Callable[[Any], Any]
    is_equality: bool

    def __post_init__(self) -> None:
        if not callable(self.fun):
            maker = "eq" if self.is_equality else "ineq"
            raise TypeError(f"{maker}: the constraint must be a function of fun's argument, got {self.fun!r}.")


def eq(fun: Callable[[Any], Any]) -> Constraint:
    """The constraint ``fun(x) == 0``, for ``minimize(..., constraints=[...])``.

    Args:
        fun: maps the same argument as the function that is minimized to a real tensor of any shape, always the same;
            every entry is to be 0. Smooth.
    Returns:
        The constraint. SciPy writes it ``{"type": "eq", "fun": fun}``.
    Example:
        >>> import torch
        >>> from descend import minimize
        >>> x0 = torch.tensor([2.0, 1.0], dtype=torch.float64)
        >>> result = minimize(lambda x: x.sum(), x0, constraints=[eq(lambda x: x.square().sum() - 2)])
        >>> [round(number, 6) for number in result.x.tolist()]
        [-1.0, -1.0]
    """
    return Constraint(fun, is_equality=True)


def ineq(fun: Callable[[Any], Any]) -> Constraint:
    """The constraint ``fun(x) >= 0``, for ``minimize(..., constraints=[...])``.

    Args:
        fun: maps the same argument as the function that is minimized to a real tensor of any shape, always the same;
            no entry is to be negative. Smooth. For limits of single variables, ``bounds`` are better.
    Returns:
        The constraint. SciPy writes it ``{"type": "ineq", "fun": fun}``; the sign is the same.
    Example:
        >>> import torch
        >>> from descend import minimize
        >>> x0 = torch.tensor([2.0, 1.0], dtype=torch.float64)
        >>> result = minimize(lambda x: x.square().sum(), x0, constraints=[ineq(lambda x: x.sum() - 1)])
        >>> [round(number, 6) for number in result.x.tolist()], round(result.multipliers[0].item(), 6)
        ([0.5, 0.5], 1.0)
    """
    return Constraint(fun, is_equality=False)
