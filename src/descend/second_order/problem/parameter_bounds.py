"""Bounds on an optimizer's parameters, given by group or by name, as two flat vectors."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from descend.second_order.problem.parameters import FlatParameters, ParamGroups
from descend.second_order.problem.shared_space import full_of


def flat_bounds(point: FlatParameters, groups: ParamGroups, bounds: Any, who: str) -> tuple[Tensor, Tensor] | None:
    """The bounds of all parameters as two flat vectors, infinite where there is none.

    Args:
        point: the parameters.
        groups: their groups; a group's own ``"bounds"`` take precedence over ``bounds``.
        bounds: ``(lower, upper)``, each a number, a tensor that broadcasts to the (whole) parameters, or None; or a
            dict from names of parameters to such pairs; or None.
        who: the optimizer's name, for errors.
    Returns:
        lower and upper; None if nothing is bounded.
    Raises:
        ValueError: if bounds are malformed, contain NaN, contradict each other, do not fit a parameter's shape, or
            name an unknown parameter.
    """
    names = [name for group in groups for name in group.get("param_names", [None] * len(group["params"]))]
    owned = [group.get("bounds") for group in groups for _ in group["params"]]
    for by_name in (bounds, *owned):
        if isinstance(by_name, dict):
            _check_names(by_name, names, who)
    ends = []
    for index, (param, name, own) in enumerate(zip(point.params, names, owned, strict=True)):
        pair = _pair(own, name) or _pair(bounds, name)
        ends.append(_ends(pair, param, name or f"parameter {index}", who) if pair else None)
    if not any(ends):
        return None
    lower = torch.full((point.space.numel,), -torch.inf, dtype=point.dtype, device=point.device)
    upper = -lower
    sizes = point.structure.sizes
    for end, low, high in zip(ends, torch.split(lower, sizes), torch.split(upper, sizes), strict=True):
        if end is not None:
            low.copy_(end[0].reshape(-1))
            high.copy_(end[1].reshape(-1))
    return point.narrow(lower), point.narrow(upper)


def _pair(bounds: Any, name: str | None) -> Any:
    return bounds.get(name) if isinstance(bounds, dict) else bounds


def _check_names(bounds: dict[Any, Any], names: Sequence[str | None], who: str) -> None:
    known = [name for name in names if name is not None]
    for name in bounds:
        if not known:
            raise ValueError(
                f"{who}: bounds by name need named parameters, got bounds for {name!r}. "
                "Pass model.named_parameters() or (name, parameter) pairs."
            )
        if name not in known:
            near = difflib.get_close_matches(str(name), known) or known[:5]
            raise ValueError(f"{who}: bounds name {name!r}, which is no parameter's name. Near: {', '.join(near)}.")


def _ends(pair: Any, param: Tensor, name: str, who: str) -> tuple[Tensor, Tensor]:
    if not (isinstance(pair, tuple | list) and len(pair) == 2):
        raise ValueError(
            f"{who}: bounds of {name} must be (lower, upper), each a number, tensor or None, got {pair!r}."
        )
    if param.is_complex():
        raise ValueError(f"{who}: complex numbers have no order, so {name} cannot have bounds, got {pair!r}.")
    ends = []
    for what, end, none in (("lower", pair[0], -torch.inf), ("upper", pair[1], torch.inf)):
        try:
            end = full_of(end)
            tensor = torch.as_tensor(none if end is None else end, dtype=torch.float64).detach()
            ends.append(tensor.to(param.device).expand(param.shape))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{who}: the {what} bound of {name} must be a number or a tensor that broadcasts to its shape "
                f"{tuple(param.shape)}, got {end!r}."
            ) from error
        if bool((tensor.isnan() | (tensor == -none)).any()):
            raise ValueError(f"{who}: the {what} bound of {name} must be neither NaN nor {-none}, got {end!r}.")
    lower, upper = ends
    if bool((lower > upper).any()):
        raise ValueError(f"{who}: the lower bound of {name} is above its upper bound, got {pair!r}.")
    return lower, upper
