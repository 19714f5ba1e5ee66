"""Further arguments of the caller's functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def check_args(who: str, args: Any) -> None:
    """Raise ``TypeError`` unless ``args`` is a tuple."""
    if not isinstance(args, tuple):
        raise TypeError(
            f"{who}: args must be a tuple of further arguments of the function, got {type(args).__name__}. Write "
            "args=(value,) for a single one."
        )


def with_args(who: str, args: Any, *functions: Any) -> list[Any]:
    """The functions with ``args`` appended to their arguments; None and bools, which stand for none, as they are.

    Raises:
        TypeError: if ``args`` is not a tuple.
    """
    check_args(who, args)
    return [_with_args(function, args) if args and callable(function) else function for function in functions]


def _with_args(function: Callable[..., Any], args: tuple[Any, ...]) -> Callable[..., Any]:
    return lambda *first: function(*first, *args)
