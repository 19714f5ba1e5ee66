"""What a rule takes, read from the function itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Signature(NamedTuple):
    """What a rule takes after the parameter and its gradient."""

    state: tuple[str, ...]
    numbers: tuple[str, ...]
    defaults: Mapping[str, float]


@cache
def signature(rule: Callable[..., Any]) -> Signature:
    """The state and the numbers of ``rule``: as many state tensors as it returns values beyond the parameter."""
    parameters = inspect.signature(rule).parameters
    odd = [name for name, parameter in parameters.items() if parameter.kind not in _POSITIONAL]
    if odd:
        raise TypeError(f"a rule takes positional arguments only, got {', '.join(odd)} in {rule.__name__}.")
    names = list(parameters)[2:]
    results = rule(*(torch.ones((), dtype=torch.float64, device="cpu") for _ in parameters))
    count = len(results) - 1 if isinstance(results, tuple) else 0
    numbers = names[count:]
    defaults = {n: parameters[n].default for n in numbers if parameters[n].default is not inspect.Parameter.empty}
    return Signature(tuple(names[:count]), tuple(numbers), defaults)
