"""Loading state dictionaries of L-BFGS, torch's or ours, and Newton: validated as a whole, copied, never narrowed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from descend.checkpoint import restore
from descend.second_order.parameters import FlatParameters

if TYPE_CHECKING:
    from descend.second_order.lbfgs import LBFGS
    from descend.second_order.newton import Newton

    ClosureOptimizer: TypeAlias = LBFGS | Newton

_MEMORY = ("n_iter", "d", "t", "old_dirs", "old_stps", "ro", "H_diag", "prev_flat_grad", "prev_loss")


def load(optimizer: ClosureOptimizer, state_dict: dict[str, Any]) -> None:
    """Load what ``state_dict`` returned, of an optimizer that keeps all state under its first parameter."""
    restore(optimizer, state_dict, _groups, _state)


def _groups(optimizer: ClosureOptimizer, saved_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    if len(sizes) != len(saved_sizes):
        raise ValueError(
            "loaded state dict has a different number of parameter groups "
            f"({len(saved_sizes)}, this optimizer has {len(sizes)})"
        )
    if sizes != saved_sizes:
        raise ValueError(
            "loaded state dict contains a parameter group that doesn't match the size of optimizer's group "
            f"({saved_sizes} parameters saved, {sizes} here)"
        )
    loaded = []
    for current, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        loaded.append({**current, **{key: deepcopy(value) for key, value in saved.items() if key != "params"}})
        optimizer.check_options(loaded[-1])
    optimizer.check_groups(loaded)
    return loaded


def _state(optimizer: ClosureOptimizer, state_dict: Mapping[str, Any]) -> defaultdict[Any, Any]:
    point = FlatParameters(optimizer.param_groups, type(optimizer).__name__)
    saved_keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    owner = dict(zip(saved_keys, point.params, strict=True))
    loaded: defaultdict[Any, Any] = defaultdict(dict)
    for key, saved in state_dict["state"].items():
        if owner.get(key) is point.params[0] and "d" in saved:
            _check(saved, point.numel, type(optimizer).__name__)
        loaded[owner.get(key, key)] = _copied(saved, point)
    return loaded


def _check(saved: Mapping[str, Any], numel: int, who: str) -> None:
    """Raise ``ValueError`` unless this is the memory of ``numel`` numbers."""
    if missing := set(_MEMORY) - set(saved):
        raise ValueError(f"{who}: the loaded state lacks {', '.join(sorted(missing))}.")
    vectors = {name: [saved[name]] for name in ("d", "prev_flat_grad") if saved[name] is not None}
    vectors |= {name: saved[name] or [] for name in ("old_dirs", "old_stps")}
    for name, tensors in vectors.items():
        for tensor in tensors:
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            if shape != (numel,):
                raise ValueError(
                    f"{who}: the loaded {name} has shape {shape}, the parameters together have {numel} entries. "
                    "Is it the state of other parameters?"
                )
    lengths = {name: len(saved[name] or ()) for name in ("old_dirs", "old_stps", "ro")}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"{who}: the loaded lists of pairs must have one length, got {lengths}.")
    for name in ("n_iter", "t", "H_diag", "prev_loss"):
        number = saved[name]
        is_number = isinstance(number, int | float) or (isinstance(number, Tensor) and number.numel() == 1)
        if not is_number and saved["n_iter"]:
            raise ValueError(f"{who}: the loaded {name} must be a number, got {type(number).__name__}.")


def _copied(value: Any, point: FlatParameters) -> Any:
    if isinstance(value, Tensor):
        dtype = torch.promote_types(value.dtype, point.dtype) if value.is_floating_point() else value.dtype
        return value.detach().to(point.device, dtype, copy=True)
    if isinstance(value, list | tuple):
        return [_copied(entry, point) for entry in value]
    if isinstance(value, Mapping):
        return {key: _copied(entry, point) for key, entry in value.items()}
    return deepcopy(value)
