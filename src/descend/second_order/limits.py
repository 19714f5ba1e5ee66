"""The limits that users set: checked, and as solvers count them."""

from __future__ import annotations

import math
from numbers import Integral, Real

MAX_ITER = 15_000


def check_limits(
    who: str,
    tol: float | None,
    max_iter: int | None,
    max_eval: int | None,
    differentiable: bool,
    history_size: int | None = None,
) -> None:
    """Raise an error if one is out of range. A derivative takes one evaluation, so that two are the least then."""
    check_tol(who, tol)
    if not isinstance(differentiable, bool):
        raise TypeError(f"{who}: differentiable must be True or False, got {differentiable!r}.")
    limits = (("max_iter", max_iter, 0), ("max_eval", max_eval, 1 + differentiable), ("history_size", history_size, 1))
    for name, value, least in limits:
        if value is not None:
            check_limit(who, name, value, least)


def check_tol(who: str, tol: object) -> None:
    """Raise ``ValueError`` unless ``tol`` is None or a finite number that is not negative."""
    try:
        is_valid = tol is None or (isinstance(tol, Real) and 0 <= float(tol) < math.inf)
    except OverflowError:  # an integer beyond the floats
        is_valid = False
    if not is_valid:
        raise ValueError(f"{who}: tol must be a finite number >= 0, got {tol!r:.40}.")


def check_limit(who: str, name: str, value: object, least: int) -> None:
    """Raise ``ValueError`` unless the limit ``name`` is an integer that is at least ``least``."""
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise ValueError(f"{who}: {name} must be an integer >= {least}, got {value!r}.")


def solver_limits(max_iter: int | None, max_eval: int | None, differentiable: bool) -> tuple[float, float]:
    """Iterations and evaluations that a solver may take: one evaluation is left for a derivative."""
    return (
        MAX_ITER if max_iter is None else int(max_iter),
        math.inf if max_eval is None else int(max_eval) - differentiable,
    )
