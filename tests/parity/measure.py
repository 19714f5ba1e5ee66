"""What a program can see of an optimizer class, as text: the same questions for torch's class and for ours."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from bad_inputs import BAD_INPUTS, BadInput
from torch import Tensor
from torch.optim import Optimizer

KINDS = ("argument", "attribute", "method", "state key", "group key", "error")
START = 40  # characters of an error's text that programs match

# Flags that choose an implementation; they make no other state on the CPU.
HOW_TO_RUN = ("foreach", "fused", "capturable", "differentiable")


class Item(NamedTuple):
    """One thing a program can rely on."""

    kind: str
    name: str


def describe(optimizer_class: type[Optimizer], like: type[Optimizer] | None = None) -> dict[Item, str]:
    """Everything that is measured of a class, under what it is called.

    Args:
        optimizer_class: the class.
        like: whose arguments decide which options and mistakes are tried. Default: the class itself.
    """
    like = like or optimizer_class
    return {
        Item(kind, name): detail
        for kind, of_kind in (
            ("argument", _arguments(optimizer_class)),
            ("attribute", _attributes(optimizer_class)),
            ("method", _methods(optimizer_class)),
            ("state key", _state_keys(optimizer_class, like)),
            ("group key", _group_keys(optimizer_class)),
            ("error", _errors(optimizer_class, like)),
        )
        for name, detail in of_kind
    }


def signature_of(function: Callable[..., Any]) -> list[tuple[str, str]]:
    """Name, kind, place and default of each argument."""
    told = []
    for place, parameter in enumerate(inspect.signature(function).parameters.values()):
        kind = "keyword" if parameter.kind is parameter.KEYWORD_ONLY else f"number {place}"
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue  # torch's decorators hide signatures behind these, ours hold what torch has not
        default = "required" if parameter.default is parameter.empty else f"`{parameter.default!r}`"
        told.append((parameter.name, f"{kind}, {default}"))
    return told


def same(item: Item, theirs: str, ours: str | None) -> bool:
    """Whether ours keeps what torch's class promises."""
    if ours is None:
        return False
    return ours.startswith(theirs.rstrip(".")) if item.kind == "error" else ours == theirs


def make(optimizer_class: type[Optimizer], **options: Any) -> Optimizer:
    """An optimizer of two parameters that have gradients, sparse ones where the class wants them."""
    params = [torch.ones(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2), (4, 2))]
    optimizer = optimizer_class(params, **options)
    for param in params:
        dense = torch.full_like(param, 0.5)
        param.grad = dense.to_sparse(1) if optimizer_class.__name__ == "SparseAdam" else dense
    return optimizer


def step(optimizer: Optimizer) -> None:
    """A step, with the closure that some classes need; the gradients are there already."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if type(optimizer).__name__ == "LBFGS":
        optimizer.step(lambda: _loss(params))
    else:
        optimizer.step()


def _loss(params: list[Tensor]) -> Tensor:
    loss = torch.stack([param.sin().sum() for param in params]).sum()  # bounded, also for maximize
    for param in params:
        param.grad = None
    loss.backward()
    return loss


def _arguments(optimizer_class: type[Optimizer]) -> Iterator[tuple[str, str]]:
    yield from signature_of(optimizer_class)


def _attributes(optimizer_class: type[Optimizer]) -> Iterator[tuple[str, str]]:
    optimizer = make(optimizer_class)
    for name in sorted({*dir(optimizer_class), *vars(optimizer)}):
        value = getattr(optimizer, name)
        if not name.startswith("_") and not inspect.isroutine(value):
            yield name, next(kind.__name__ for kind in (list, dict, object) if isinstance(value, kind))
    yield "repr", f"`{repr(optimizer).splitlines()[0]}` and the options"


def _methods(optimizer_class: type[Optimizer]) -> Iterator[tuple[str, str]]:
    for name in sorted(dir(optimizer_class)):
        method = getattr(optimizer_class, name)
        if not name.startswith("_") and inspect.isroutine(method):
            arguments = (argument for argument, _ in signature_of(inspect.unwrap(method)) if argument != "self")
            yield name, f"`({', '.join(arguments)})`"


def _variants(optimizer_class: type[Optimizer]) -> Iterator[dict[str, Any]]:
    """Options that may bring state of their own: flags turned on, numbers that are zero made positive."""
    yield {}
    for name, parameter in inspect.signature(optimizer_class).parameters.items():
        if name in HOW_TO_RUN:
            continue
        if parameter.default is False:
            yield {name: True}
        elif parameter.default == 0 and isinstance(parameter.default, int | float):
            yield {name: 0.5}
    if "line_search_fn" in inspect.signature(optimizer_class).parameters:
        yield {"line_search_fn": "strong_wolfe"}


def _state_keys(optimizer_class: type[Optimizer], like: type[Optimizer]) -> Iterator[tuple[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for options in _variants(like):
        try:
            optimizer = make(optimizer_class, **options)
        except (TypeError, ValueError):  # needs another option too, or ours has no such option
            continue
        label = ", ".join(f"{name}={value!r}" for name, value in options.items())
        for _ in range(2):
            step(optimizer)
        for param, state in optimizer.state.items():
            for name, value in state.items():
                found.setdefault(name, {})[label] = _shape_of(value, param)
    for name, told in sorted(found.items()):
        shapes = ", or ".join(sorted(set(told.values())))
        only = "" if "" in told else f"; with `{'`, `'.join(told)}`"
        yield name, shapes + only


def _shape_of(value: Any, param: Tensor) -> str:
    if not isinstance(value, Tensor):
        return f"`{type(value).__name__}`"
    if value.shape == param.shape:
        return "a tensor like the parameter" if value.dtype == param.dtype else f"{value.dtype} like the parameter"
    what = "a tensor of shape ()" if value.dim() == 0 else "a vector"
    return f"{what}, {str(value.dtype).removeprefix('torch.')}"


def _group_keys(optimizer_class: type[Optimizer]) -> Iterator[tuple[str, str]]:
    for name, value in make(optimizer_class).param_groups[0].items():
        yield name, f"`{value!r}`" if name != "params" else "a list"
    named = [("weight", torch.ones(2, 2, requires_grad=True))]
    yield "param_names", f"`{optimizer_class(named).param_groups[0].get('param_names')!r}` for named parameters"


def _errors(optimizer_class: type[Optimizer], like: type[Optimizer]) -> Iterator[tuple[str, str]]:
    for bad in BAD_INPUTS:
        if bad.applies(like):
            yield bad.name, _what_happens(optimizer_class, bad)


def _what_happens(optimizer_class: type[Optimizer], bad: BadInput) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            bad.attempt(optimizer_class)
        except Exception as error:  # whatever it is
            text = str(error).splitlines()[0] if str(error) else ""
            return f"{type(error).__name__}: {text[:START]}"
    mine = [warning for warning in caught if "duplicate" in str(warning.message)]
    return f"a warning: {str(mine[0].message)[:START]}" if mine else "accepted"
