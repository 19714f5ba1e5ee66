"""Load state dictionaries of any optimizer: validate and copy all of it, then put it in place."""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from descend.checkpoint.matching import listed
from descend.core import memory
from descend.state.container import updatable_tensors

# Flags that choose how to run belong to the running program, not to the file.
_RUN_TIME = ("foreach", "fused", "capturable", "differentiable")
_NOT_OPTIONS = ("params", "param_names")

LoadedGroups: TypeAlias = list[dict[str, Any]]
LoadedState: TypeAlias = defaultdict[Any, dict[str, Any]]


def restore(
    optimizer: Any,
    state_dict: Mapping[str, Any],
    read: Callable[[Mapping[str, Any]], tuple[LoadedGroups, LoadedState]],
) -> None:
    """Run the hooks around loading, and change the optimizer only after everything has been read and checked.

    Args:
        optimizer: the optimizer to load into.
        state_dict: the dictionary given by the user; the hooks may replace it.
        read: makes groups and state from the dictionary. Only the form of the dictionary has been checked by then.
    Raises:
        TypeError: if ``state_dict`` is not a dictionary.
        ValueError: if it is not a state dictionary, or ``read`` refuses it.
    """
    who = type(optimizer).__name__
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"{who}: load_state_dict takes a dictionary, got {type(state_dict).__name__}.")
    state_dict = {**state_dict}
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = pre_hook(optimizer, state_dict)
        if replaced is not None:
            state_dict = replaced
    _check_form(who, state_dict)
    try:
        with updatable_tensors():
            groups, state = read(state_dict)
    except RuntimeError as error:  # by torch, for a tensor without values, say
        raise ValueError(f"{who}: the loaded state dict cannot be copied: {error}") from error
    optimizer.__setstate__({"state": state, "param_groups": groups})
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def set_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Call torch's ``__setstate__``, but remove the ``differentiable`` that it adds to every class's defaults."""
    has_flag = "differentiable" in {**optimizer.__dict__, **state}["defaults"]
    Optimizer.__setstate__(optimizer, {**state})
    if not has_flag:
        del optimizer.defaults["differentiable"]


def copied(value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """A deep copy: ``convert`` copies the tensors, in nested lists, tuples and dicts too."""
    if isinstance(value, Tensor):
        if memory.is_freed(value):
            raise RuntimeError("the memory of a tensor has been freed.")
        return convert(value)
    if type(value) in (list, tuple):
        return type(value)(copied(entry, convert) for entry in value)
    if isinstance(value, Mapping):
        return {key: copied(entry, convert) for key, entry in value.items()}
    return copy.deepcopy(value)


def cloned(tensor: Tensor) -> Tensor:
    """A clone that is a leaf, with the same ``requires_grad``."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def options_of(saved: Mapping[str, Any], clone: Callable[[Tensor], Tensor] = cloned) -> dict[str, Any]:
    """Copies of a saved group's options, but not of how to run; ``clone`` copies the tensors among them."""
    return {name: copied(value, clone) for name, value in saved.items() if name not in (*_NOT_OPTIONS, *_RUN_TIME)}


@contextmanager
def unusable_is_value_error(who: str, group: int) -> Iterator[None]:
    """Turn any exception of the block, which tries the options of a group, into a ``ValueError``."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error} (group {group} of the loaded state dict)") from None
    except Exception as error:  # raised by arithmetic with strings, None or tensors
        raise ValueError(
            f"{who}: the options of group {group} of the loaded state dict cannot be used: {error}"
        ) from error


def number_of(value: Any, what: str, is_count: bool = False) -> Any:
    """A copy of a finite number, or of a tensor of one element, moved to the CPU; a count is >= 0."""
    number = value
    if isinstance(value, Tensor):
        is_one = value.numel() == 1 and not value.is_meta
        value = copied(value, lambda tensor: tensor.detach().clone().cpu()) if is_one else value
        number = value.item() if is_one else f"a tensor of shape {tuple(value.shape)}"
    is_number = isinstance(number, Real) and not isinstance(number, bool)
    if not is_number or not abs(number) <= sys.float_info.max or (is_count and number < 0):
        raise ValueError(f"{what} must be a number{' >= 0' if is_count else ''}, got {number!r:.40}.")
    return value


def _check_form(who: str, state_dict: Any) -> None:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"{who}: a hook replaced the state dict by a {type(state_dict).__name__}.")
    if missing := sorted({"state", "param_groups"} - set(state_dict)):
        raise ValueError(f"{who}: a state dict has 'state' and 'param_groups', this one lacks {listed(missing)}.")
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(groups, list | tuple):
        raise ValueError(f"{who}: param_groups of a state dict is a list, got {type(groups).__name__}.")
    for index, group in enumerate(groups):
        params = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(params, list | tuple) or not all(isinstance(key, int | str) for key in params):
            raise ValueError(f"{who}: group {index} of the loaded state dict has no list 'params' of numbers or names.")
        names = group.get("param_names", params)
        # torch.distributed replaces params by names, and leaves param_names as they were saved.
        are_keys = all(isinstance(key, str) for key in params)
        if not are_keys and (not isinstance(names, list | tuple) or len(names) != len(params)):
            raise ValueError(
                f"{who}: param_names of group {index} of the loaded state dict must be a list of {len(params)} names, "
                "one for each of its parameters."
            )
    if not isinstance(state, Mapping):
        raise ValueError(f"{who}: state of a state dict is a dictionary, got {type(state).__name__}.")
    keys = {key for group in groups for key in group["params"]}
    for key, content in state.items():
        if key in keys and not isinstance(content, Mapping):  # other keys may hold anything
            raise ValueError(f"{who}: the loaded state of {key!r} is a {type(content).__name__}, not a dictionary.")
