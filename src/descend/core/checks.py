"""Checks of options that several optimizers share, with torch's error texts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Set
from functools import lru_cache
from typing import Any

from torch import Tensor


def check_kinds(method: object, options: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if an option is not of its default's kind: a number, a pair of numbers, or a flag."""
    kind: Any = type(method)
    for name in _defaults(kind):
        if name in options:
            check_kind(method, options, name)


def check_kind(method: object, options: Mapping[str, Any], name: str) -> None:
    """Raise ``ValueError`` if the option ``name`` is not of its default's kind."""
    kind: Any = type(method)
    default, value = _defaults(kind)[name], options[name]
    if isinstance(default, bool):
        expected, is_right = "True or False", _converts(bool, value) and not isinstance(value, str | bytes)
    elif isinstance(default, tuple):
        expected = f"{len(default)} numbers"
        is_right = is_sequence(value, len(default)) and all(
            _is_number(each) or each is start is None for each, start in zip(value, default, strict=True)
        )
    else:
        expected, is_right = "a number", _is_number(value)
    if not is_right:
        raise ValueError(f"{type(method).__name__}: {name} must be {expected}, got {value!r:.80}.")


@lru_cache(maxsize=256)
def _defaults(kind: Any) -> dict[str, Any]:
    """Defaults of a class and its bases: a subclass may take ``**options`` and pass them on."""
    parameters = [each for base in kind.__mro__ for each in inspect.signature(base.__init__).parameters.values()]
    return {each.name: each.default for each in parameters if isinstance(each.default, bool | int | float | tuple)}


def is_sequence(values: Any, count: int) -> bool:
    """Whether ``values`` is a tuple, a list or an array of ``count`` items."""
    return _converts(len, values) and len(values) == count and not isinstance(values, str | bytes | Set | Mapping)


def _is_number(value: Any) -> bool:
    value = value.detach() if isinstance(value, Tensor) else value
    return not isinstance(value, str | bytes) and _converts(float, value)


def _converts(kind: Callable[[Any], Any], value: Any) -> bool:
    try:
        kind(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False
    return True


def check_at_least_zero(method: object, what: str, name: str, value: Any) -> None:
    """Raise torch's error if an option is negative, NaN or no number at all."""
    try:
        valid = bool(value >= 0)
    except (TypeError, RuntimeError, ValueError):  # no number, or several
        valid = False
    if not valid:
        raise ValueError(f"Invalid {what}: {value} ({type(method).__name__}: {name} must be a number >= 0)")


def check_lr(method: object, options: Mapping[str, Any]) -> None:
    """Raise torch's errors for a learning rate that is negative, NaN or a tensor of several elements."""
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element ({type(method).__name__}: got shape {tuple(lr.shape)})")
    check_at_least_zero(method, "learning rate", "lr", lr)


def check_betas(method: object, options: Mapping[str, Any]) -> None:
    """Raise torch's error unless both are in [0, 1)."""
    check_kind(method, options, "betas")
    for index, beta in enumerate(options["betas"]):
        if not 0 <= beta < 1:
            name = type(method).__name__
            raise ValueError(
                f"Invalid beta parameter at index {index}: {beta} ({name}: betas[{index}] must be in [0, 1))"
            )


def check_eps(method: object, options: Mapping[str, Any]) -> None:
    """Raise torch's error for a negative ``eps``."""
    check_at_least_zero(method, "epsilon value", "eps", options["eps"])


def check_not_negative(method: object, options: Mapping[str, Any], *names: str) -> None:
    """Raise torch's error if one of the options ``names`` is negative, NaN or no number."""
    for name in names:
        check_at_least_zero(method, f"{name} value", name, options[name])


def check_adam(method: object, options: Mapping[str, Any]) -> None:
    """Raise torch's errors for the options that all relatives of Adam have."""
    check_lr(method, options)
    check_eps(method, options)
    check_betas(method, options)
    check_not_negative(method, options, "weight_decay")


def check_flags(options: Mapping[str, Any]) -> None:
    """Raise torch's errors for flags that exclude each other."""
    if options["fused"] and options["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`; leave one of them out.")
    if options["fused"] and options["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
