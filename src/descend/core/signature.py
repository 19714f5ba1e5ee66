"""What a rule takes, read from the function itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

Kind: TypeAlias = Literal["element", "row", "matrix"]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Signature(NamedTuple):
    """What a rule takes after the parameter and its gradient.

    Attributes:
        state: names of the state tensors.
        scalars: names of the scalars that follow them.
        defaults: default values of scalars that have one.
        kind: "element" if the rule acts on each element by itself, "row" if it needs means over rows, "matrix" if it
            needs whole tensors.
        summed: the part whose results are summed before the rule is applied, see ``ops.summing``; or None.
        sums: how many numbers the part returns.
        averaged: the part whose mean over each row the rule needs, see ``ops.of_rows``; None if there is none.
        formed: names of the last scalars, which are formed of the part's results.
    """

    state: tuple[str, ...]
    scalars: tuple[str, ...]
    defaults: Mapping[str, float]
    kind: Kind
    summed: Callable[..., Any] | None = None
    sums: int = 0
    averaged: Callable[..., Any] | None = None
    formed: tuple[str, ...] = ()

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the scalars that are known before anything is summed."""
        return self.scalars[: len(self.scalars) - len(self.formed)]


def averaged_part(rule: Callable[..., Any]) -> Callable[..., Any] | None:
    """What a rule of rows is marked with, see ``ops.of_rows``; None for other rules."""
    return getattr(rule, "averaged", None)


@cache
def signature(rule: Callable[..., Any]) -> Signature:
    """The signature of ``rule``, which has as many state tensors as it returns values beyond the parameter."""
    parameters = _positional(rule)
    names = list(parameters)[2:]
    kind: Kind = getattr(rule, "kind", "row" if averaged_part(rule) else "element")
    count = getattr(rule, "state", None)
    if count is None:
        shape = (1, 1) if kind == "matrix" else ()
        results = rule(*(torch.ones(shape, dtype=torch.float64, device="cpu") for _ in parameters))
        count = len(results) - 1 if isinstance(results, tuple) else 0
    scalars = names[count:]
    defaults = {n: parameters[n].default for n in scalars if parameters[n].default is not inspect.Parameter.empty}
    takes = Signature(tuple(names[:count]), tuple(scalars), defaults, kind)
    part = getattr(rule, "summed", None)
    if (averaged := averaged_part(rule)) is not None:
        return _with_means(takes, rule, averaged)
    return takes if part is None else _with_sums(takes, rule, part)


def _positional(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters
    odd = [name for name, parameter in parameters.items() if parameter.kind not in _POSITIONAL]
    if odd:
        raise TypeError(f"a rule takes positional arguments only, got {', '.join(odd)} in {function.__name__}.")
    return parameters


def _with_sums(takes: Signature, rule: Callable[..., Any], part: Callable[..., Any]) -> Signature:
    """The signature of a rule with a part that is summed."""
    all_names, names = tuple(_positional(rule)), tuple(_positional(part))
    if takes.kind == "matrix":
        raise TypeError(f"{rule.__name__} sees whole matrices and can sum by itself: leave out `summing`.")
    fewest, most = 2 + len(takes.state), len(all_names) - 1
    if names != all_names[: len(names)] or not fewest <= len(names) <= most:
        raise TypeError(
            f"{part.__name__} is summed for {rule.__name__}, so it must take the first arguments of that, by the same "
            f"names: from {fewest} to {most} of {', '.join(all_names)}; got {', '.join(names)}."
        )
    results = part(*(torch.ones((), dtype=torch.float64, device="cpu") for _ in names))
    count = len(results) if isinstance(results, tuple) else 1
    if isinstance(results, tuple) and count < 2:
        raise TypeError(f"{part.__name__} must return a number, or a tuple of at least two, got {results}.")
    return takes._replace(summed=part, sums=count, formed=all_names[len(names) :])


def _with_means(takes: Signature, rule: Callable[..., Any], part: Callable[..., Any]) -> Signature:
    """The signature of a rule of rows."""
    all_names, names = tuple(_positional(rule)), tuple(_positional(part))
    if takes.kind != "row" or hasattr(rule, "summed"):
        raise TypeError(f"{rule.__name__} is marked twice: of rows, and as a rule that needs whole tensors.")
    if not takes.scalars or names != all_names[:-1]:
        raise TypeError(
            f"{part.__name__} is averaged for {rule.__name__}, so it must take the arguments of that, by the same "
            f"names, but for the last, a scalar: {', '.join(all_names[:-1])}; got {', '.join(names)}."
        )
    return takes._replace(averaged=part, formed=all_names[-1:])
