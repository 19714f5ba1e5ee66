"""What a rule takes, read from the function itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import torch

Kind: TypeAlias = Literal["element", "row", "matrix"]
Rule = TypeVar("Rule", bound=Callable[..., Any])

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Signature(NamedTuple):
    """What a rule takes after the parameter and its gradient.

    Attributes:
        state: names of the state tensors.
        scalars: names of the scalars that follow them.
        defaults: default values of scalars that have one.
        kind: "element" if the rule acts on each element by itself, "row" if it needs means over rows, "matrix" if it
            needs whole tensors.
        averaged: the part whose means over each row the rule needs, see ``of_rows``; None if there is none.
        formed: names of the last scalars, which are formed of the part.
    """

    state: tuple[str, ...]
    scalars: tuple[str, ...]
    defaults: Mapping[str, float]
    kind: Kind
    averaged: Callable[..., Any] | None = None
    formed: tuple[str, ...] = ()

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the scalars that are known before anything is formed."""
        return self.scalars[: len(self.scalars) - len(self.formed)]


def of_rows(part: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Mark a rule as one of rows: it needs the mean of something over each row before it acts on the row's elements.

    A row is what an index of the parameter's first dimension names; the whole of a 0-dim parameter. The state is one
    number a row: tensors of shape (rows, 1). Backends may cut a tensor between rows, and not within one.

    Args:
        part: ``part(param, grad, *state, *scalars)`` returns a number for each element. Its arguments are those of the
            rule, by the same names, without the last one, which is the mean of these numbers over the row.
    Returns:
        A decorator.
    Example:
        >>> from descend.ops import sqrt
        >>> def square(param, grad, lr):
        ...     return grad * grad
        >>> @of_rows(square)
        ... def normalized(param, grad, lr, mean_square):
        ...     return param - lr / sqrt(mean_square) * grad
        >>> signature(normalized).given, signature(normalized).formed
        (('lr',), ('mean_square',))
    """

    def mark(rule: Rule) -> Rule:
        rule.kind, rule.averaged = "row", part  # type: ignore[attr-defined]
        return rule

    return mark


def of_matrices(rule: Rule) -> Rule:
    """Mark a rule as one of whole matrices, which no backend may cut into elements, chunks or rows."""
    rule.kind = "matrix"  # type: ignore[attr-defined]
    return rule


def averaged_part(rule: Callable[..., Any]) -> Callable[..., Any] | None:
    """What a rule of rows is marked with, see ``of_rows``; None for other rules."""
    return getattr(rule, "averaged", None)


@cache
def signature(rule: Callable[..., Any]) -> Signature:
    """The signature of ``rule``, which has as many state tensors as it returns values beyond the parameter."""
    parameters = inspect.signature(rule).parameters
    odd = [name for name, parameter in parameters.items() if parameter.kind not in _POSITIONAL]
    if odd:
        raise TypeError(f"a rule takes positional arguments only, got {', '.join(odd)} in {rule.__name__}.")
    names = list(parameters)[2:]
    kind: Kind = getattr(rule, "kind", "element")
    shape = (1, 1) if kind == "matrix" else ()
    results = rule(*(torch.ones(shape, dtype=torch.float64, device="cpu") for _ in parameters))
    count = len(results) - 1 if isinstance(results, tuple) else 0
    scalars = names[count:]
    defaults = {n: parameters[n].default for n in scalars if parameters[n].default is not inspect.Parameter.empty}
    averaged = averaged_part(rule)
    if averaged is None:
        return Signature(tuple(names[:count]), tuple(scalars), defaults, kind)
    taken = list(inspect.signature(averaged).parameters)
    if not scalars or taken != list(parameters)[:-1]:
        raise TypeError(
            f"{averaged.__name__} is averaged for {rule.__name__}, so it must take the arguments of that, by the same "
            f"names, but for the last, a scalar: {', '.join(list(parameters)[:-1])}; got {', '.join(taken)}."
        )
    return Signature(tuple(names[:count]), tuple(scalars), defaults, kind, averaged, tuple(scalars[-1:]))
