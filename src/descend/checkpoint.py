"""Loading state dictionaries: validated as a whole, copied, never narrowed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from descend import exact, pages

if TYPE_CHECKING:
    from descend.optimizer import FirstOrder

# How to run is the running program's business, not the file's.
_RUN_TIME = ("foreach", "fused", "capturable", "differentiable")


def aliases(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same state in a new dict, its tensors as new tensors on the same memory."""
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in state.items()}


def load(optimizer: FirstOrder, state_dict: dict[str, Any]) -> None:
    """See ``FirstOrder.load_state_dict``."""
    restore(optimizer, state_dict, _groups, _state)


def restore(
    optimizer: Any,
    state_dict: dict[str, Any],
    read_groups: Callable[[Any, list[dict[str, Any]]], list[dict[str, Any]]],
    read_state: Callable[[Any, dict[str, Any]], defaultdict[Any, Any]],
) -> None:
    """Run the hooks around loading, and change the optimizer only after everything has been read and checked."""
    state_dict = state_dict.copy()
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = pre_hook(optimizer, state_dict)
        if replaced is not None:
            state_dict = replaced
    if missing := {"state", "param_groups"} - set(state_dict):
        raise ValueError(
            f"{type(optimizer).__name__}: a state dict needs 'state' and 'param_groups', this one lacks {missing}."
        )
    groups = read_groups(optimizer, state_dict["param_groups"])
    state = read_state(optimizer, state_dict)
    optimizer.__setstate__({"state": state, "param_groups": groups})
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _groups(optimizer: FirstOrder, saved_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    current_groups = optimizer.param_groups
    if len(current_groups) != len(saved_groups):
        raise ValueError(
            "loaded state dict has a different number of parameter groups "
            f"({len(saved_groups)}, this optimizer has {len(current_groups)})"
        )
    loaded = []
    for index, (current, saved) in enumerate(zip(current_groups, saved_groups, strict=True)):
        if len(current["params"]) != len(saved["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group "
                f"(group {index}: {len(saved['params'])} parameters saved, {len(current['params'])} here)"
            )
        options = {key: deepcopy(value) for key, value in saved.items() if key not in ("params", *_RUN_TIME)}
        group = {**current, **options}
        optimizer.check_options(group)
        loaded.append(group)
    return loaded


def _state(optimizer: FirstOrder, state_dict: Mapping[str, Any]) -> defaultdict[Any, Any]:
    saved_keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    owner = dict(zip(saved_keys, params, strict=True))
    loaded: defaultdict[Any, Any] = defaultdict(dict)
    for key, saved in state_dict["state"].items():
        if optimizer.sparse != "exact" and exact.is_behind(saved):
            raise ValueError(
                f"{type(optimizer).__name__}: this state has rows that are behind, which only sparse='exact' can "
                "bring up to date. Call settle() of the optimizer that made it before saving."
            )
        if key in owner:
            loaded[owner[key]] = {name: _value(optimizer, owner[key], name, value) for name, value in saved.items()}
            exact.check_loaded(loaded[owner[key]])
        else:
            loaded[key] = deepcopy(saved)
    return loaded


def _value(optimizer: FirstOrder, param: Tensor, name: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return deepcopy(value)
    if name == "step" or name in optimizer.keeps:
        return value.detach().clone().cpu()
    value = value.detach()
    if value.layout != torch.strided:  # torch keeps the momentum of sparse gradients like that
        value = value.to_dense()
    if (of_table := exact.loaded(name, value, param)) is not None:
        return of_table
    if value.is_floating_point() or value.is_complex():
        dtype = torch.promote_types(value.dtype, optimizer.default_state_dtype(param))
        if value.shape != param.shape:
            raise ValueError(
                f"{type(optimizer).__name__}: the loaded {name} of {optimizer.name_of(param)} has shape "
                f"{tuple(value.shape)}, the parameter {tuple(param.shape)}. Were the parameters given in another order?"
            )
        if optimizer.sparse is not None and param.is_cpu and param.is_contiguous():
            return pages.copied(value, dtype=dtype)
        # In the parameter's memory order, which is the one kernels walk.
        return torch.empty_like(param, dtype=dtype, requires_grad=False).copy_(value)
    return value.to(param.device, copy=True)
