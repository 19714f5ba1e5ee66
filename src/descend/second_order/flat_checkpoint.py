"""State dictionaries of optimizers that keep all state under the first parameter: validated, copied, never narrowed."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from descend.checkpoint.matching import Listing, Matching
from descend.checkpoint.reading import copied, number_of, options_of, unusable_is_value_error
from descend.second_order.problem.parameters import FlatParameters, ParamGroups
from descend.second_order.problem.sharded_parameters import flat_parameters

_MEMORY = ("n_iter", "d", "t", "old_dirs", "old_stps", "ro", "H_diag", "prev_flat_grad", "prev_loss")
_LISTS = ("old_dirs", "old_stps", "ro", "al")
_COUNTS = ("func_evals", "n_iter", "n_hvp", "n_jac", "radius", "damping", "scale")
_LEARNED = {
    "steps": "hn",
    "changes": "hn",
    "learned": "n",
    "diagonal": "n",
    "r_inverse": "hh",
    "gram": "hh",
    "curvatures": "h",
}
_BOUNDED = {"steps", "changes", "diagonal"}  # the keys with bounds


def check_order(who: str, groups: ParamGroups, saved_groups: ParamGroups, match: str) -> None:
    """Raise ``ValueError`` unless the parameters are equally many, and in the same order if names decide."""
    matching = Matching(who, groups, saved_groups, match)
    Matching(who, groups, saved_groups, "order").require_all()
    if matching.by_name:
        matching.require_all()
        # torch.distributed puts names in "params" into this optimizer's order, but not those in "param_names".
        for names in (matching.saved.names, Listing(saved_groups).names):
            if names is not None and names != matching.here.names:
                index = next(i for i, name in enumerate(names) if name != (matching.here.names or names)[i])
                raise ValueError(
                    f"{who}: what it has learned belongs to an order of the parameters: expected "
                    f"{matching.here.label(index)!r} in place {index}, the loaded state dict has {names[index]!r}. "
                    "Give the parameters in that order."
                )


def read_groups(
    who: str, groups: ParamGroups, saved_groups: ParamGroups, check_options: Callable[[Mapping[str, Any]], None]
) -> list[dict[str, Any]]:
    """The groups with the saved options, each checked; options that were not saved stay."""
    loaded = []
    for index, (current, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        names = {name: saved[name] for name in ("param_names",) if name in saved and name not in current}
        group = {**current, **options_of(saved), **names}
        with unusable_is_value_error(who, index):
            check_options(group)
            for value in group.values():
                if isinstance(value, int):
                    float(value)
        loaded.append(group)
    return loaded


def read_state(who: str, groups: ParamGroups, state_dict: Mapping[str, Any]) -> defaultdict[Any, dict[str, Any]]:
    """A checked copy of the saved state, for the parameters of ``groups``."""
    point = flat_parameters(groups, who)
    numel = point.space.numel
    saved_keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    owner = dict(zip(saved_keys, point.params, strict=True))
    loaded: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    for key, saved in state_dict["state"].items():
        if key in owner and saved:
            if owner[key] is not point.params[0]:
                raise ValueError(
                    f"{who}: all state belongs to the first parameter, but the loaded state dict has some for {key!r}. "
                    "Is it another optimizer's, or of parameters in another order?"
                )
            _check_numbers(saved, who)
            if "d" in saved:
                _check_memory(saved, numel, who)
            if saved.get("learned") is not None:
                _check_learned(saved["learned"], numel, who)
            if "norms" in saved:
                _check_vector("norms", saved["norms"], numel, who)
            if point.space.is_shared:
                saved = _mapped(saved, point.narrow)
            else:
                saved = {name: value for name, value in saved.items() if name != "products"}
        loaded[owner.get(key, key)] = copied(saved, lambda tensor: _widened(tensor, point))
    return loaded


def whole_state(who: str, groups: ParamGroups, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict with the vectors of one process in place of this rank's parts of them.

    They are the same on every rank, and can be loaded by any number of ranks. Collective, one vector after the other.
    """
    point = flat_parameters(groups, who)
    if not point.space.is_shared:
        return state_dict
    state = {key: _mapped(saved, point.whole) for key, saved in state_dict["state"].items()}
    return {**state_dict, "state": state}


def _mapped(saved: Mapping[str, Any], convert: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """A parameter's state with its flat vectors, and the rows of its matrices of such, converted."""
    mapped: dict[str, Any] = {**saved}
    for name in ("d", "prev_flat_grad"):
        if saved.get(name) is not None:
            mapped[name] = convert(saved[name])
    for name in ("old_dirs", "old_stps"):
        if saved.get(name) is not None:
            mapped[name] = [convert(vector) for vector in saved[name]]
    if saved.get("learned") is not None:
        vectors = {name for name, shape in _LEARNED.items() if "n" in shape}
        mapped["learned"] = {
            name: convert(value) if name in vectors else value for name, value in saved["learned"].items()
        }
    return mapped


def _check_numbers(saved: Mapping[str, Any], who: str) -> None:
    if "n_iter" not in saved:
        raise ValueError(f"{who}: the loaded state lacks n_iter: is it another optimizer's?")
    for name in _COUNTS:
        if name in saved:
            number_of(saved[name], f"{who}: the loaded {name}", is_count=True)


def _check_learned(learned: Any, numel: int, who: str) -> None:
    arrays = {name: learned[name] for name in _LEARNED if name in learned} if isinstance(learned, Mapping) else {}
    if not all(_is_readable(array) for array in arrays.values()) or set(arrays) not in (set(_LEARNED), _BOUNDED):
        raise ValueError(f"{who}: the loaded learned must be a dictionary of tensors.")
    sizes = {"n": numel, "h": len(arrays["steps"]) if arrays["steps"].ndim else 0}
    for name, array in arrays.items():
        expected = tuple(sizes[letter] for letter in _LEARNED[name])
        if tuple(array.shape) != expected:
            raise ValueError(f"{who}: the loaded {name} has shape {tuple(array.shape)}, expected {expected}.")
    for name in ("count", "is_new") if set(arrays) != _BOUNDED else ():
        value = learned.get(name)
        if not (isinstance(value, int) and 0 <= value < 2**63):
            raise ValueError(f"{who}: the loaded {name} must be an integer >= 0, got {value!r:.40}.")


def _check_memory(saved: Mapping[str, Any], numel: int, who: str) -> None:
    """Raise ``ValueError`` unless this is torch's L-BFGS state for ``numel`` entries."""
    if missing := set(_MEMORY) - set(saved):
        raise ValueError(f"{who}: the loaded state lacks {', '.join(sorted(missing))}.")
    for name in _LISTS:
        if not isinstance(saved.get(name, []), list | tuple) and not (name in _MEMORY and saved[name] is None):
            raise ValueError(f"{who}: the loaded {name} must be a list, got {type(saved[name]).__name__}.")
    vectors = {name: [saved[name]] for name in ("d", "prev_flat_grad") if saved[name] is not None}
    vectors |= {name: saved[name] or [] for name in ("old_dirs", "old_stps")}
    for name, tensors in vectors.items():
        for tensor in tensors:
            _check_vector(name, tensor, numel, who)
    lengths = {name: len(saved[name] or ()) for name in ("old_dirs", "old_stps", "ro")}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"{who}: the loaded lists of pairs must have one length, got {lengths}.")
    numbers = [(name, saved[name]) for name in ("t", "H_diag", "prev_loss") if saved["n_iter"]]
    for name, number in [*numbers, *(("ro", rho) for rho in saved["ro"] or ())]:
        is_float = (
            isinstance(number, int | float) and not isinstance(number, bool) and abs(number) <= sys.float_info.max
        )
        if not is_float and not (_is_readable(number) and number.numel() == 1):
            raise ValueError(f"{who}: the loaded {name} must be a number, got {number!r:.40}.")


def _check_vector(name: str, value: Any, numel: int, who: str) -> None:
    shape = tuple(value.shape) if _is_readable(value) else type(value).__name__
    if shape != (numel,):
        raise ValueError(
            f"{who}: the loaded {name} has shape {shape}, the parameters together have {numel} entries. "
            "Is it the state of other parameters?"
        )


def _is_readable(value: Any) -> bool:
    """Whether this is a dense tensor of floating point numbers, not on meta."""
    return (
        isinstance(value, Tensor) and value.is_floating_point() and value.layout is torch.strided and not value.is_meta
    )


def _widened(tensor: Tensor, point: FlatParameters) -> Tensor:
    dtype = tensor.dtype
    if dtype.is_floating_point:  # torch does not promote float8, which is narrower than any other
        dtype = torch.promote_types(dtype, point.dtype) if dtype.itemsize > 1 else point.dtype
    return tensor.detach().to(point.device, dtype, copy=True)
