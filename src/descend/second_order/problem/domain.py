"""Exceptions by which a function says that a point is outside its domain."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

DomainErrors: TypeAlias = tuple[type[Exception], ...]

# They say nothing about the point, even where a base class of theirs was given.
NEVER: DomainErrors = (StopIteration, MemoryError, torch.OutOfMemoryError)


def domain_errors_of(errors: Any, who: str) -> DomainErrors:
    """Exception classes as a tuple.

    Args:
        errors: one class, or a tuple or list of classes.
        who: the caller's name, for errors.
    Raises:
        TypeError: if one of them is no subclass of ``Exception``, or says nothing about the point.
    """
    classes = tuple(errors) if isinstance(errors, tuple | list) else (errors,)
    for error in classes:
        if not (isinstance(error, type) and issubclass(error, Exception)) or issubclass(error, NEVER):
            raise TypeError(
                f"{who}: domain_errors must be subclasses of Exception, except StopIteration and MemoryError, such as "
                f"(ValueError, ArithmeticError); got {error!r}."
            )
    return classes
