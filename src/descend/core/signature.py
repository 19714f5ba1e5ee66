"""What a rule takes, read from the function itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

Kind: TypeAlias = Literal["element", "matrix"]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Signature(NamedTuple):
    """What a rule takes after the parameter and its gradient.

    Attributes:
        state: names of the state tensors.
        scalars: names of the scalars that follow them.
        defaults: default values of scalars that have one.
        kind: "element" if the rule acts on each element by itself, "matrix" if it needs whole tensors.
    """

    state: tuple[str, ...]
    scalars: tuple[str, ...]
    defaults: Mapping[str, float]
    kind: Kind


@cache
def signature(rule: Callable[..., Any]) -> Signature:
    """The signature of ``rule``, which has as many state tensors as it returns values beyond the parameter."""
    parameters = inspect.signature(rule).parameters
    odd = [name for name, parameter in parameters.items() if parameter.kind not in _POSITIONAL]
    if odd:
        raise TypeError(f"a rule takes positional arguments only, got {', '.join(odd)} in {rule.__name__}.")
    names = list(parameters)[2:]
    kind: Kind = getattr(rule, "kind", "element")
    count = getattr(rule, "state", None)
    if count is None:
        shape = (1, 1) if kind == "matrix" else ()
        results = rule(*(torch.ones(shape, dtype=torch.float64, device="cpu") for _ in parameters))
        count = len(results) - 1 if isinstance(results, tuple) else 0
    scalars = names[count:]
    defaults = {n: parameters[n].default for n in scalars if parameters[n].default is not inspect.Parameter.empty}
    return Signature(tuple(names[:count]), tuple(scalars), defaults, kind)
