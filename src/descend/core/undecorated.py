"""Call methods of ``torch.optim.Optimizer`` without importing torch's compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch._compile import _disable_dynamo

Function = TypeVar("Function", bound=Callable[..., object])

_GUARD = _disable_dynamo(lambda: None).__code__  # shared by all functions that torch keeps its compiler out of


def undecorated(method: Function) -> Function:
    """A method of ``torch.optim.Optimizer`` without the decorator that keeps the compiler out of it.

    The decorator's first call imports torch._dynamo, which takes seconds. It is left in place while a program is being
    compiled.
    """
    if torch.compiler.is_compiling() or getattr(method, "__code__", None) is not _GUARD:
        return method
    return method.__wrapped__  # type: ignore[attr-defined, no-any-return]
