"""Save and load optimizers that keep a state for each parameter: matched, checked, never narrowed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descend.checkpoint.formats import Losses, dtype_name, is_lossy, looks_coded, placed, wider
from descend.checkpoint.matching import Hyperparameters, IncompatibleKeys, Match, Matching, check_choices, listed
from descend.checkpoint.parts import decoded_on_ranks, in_place_of, part_for
from descend.checkpoint.reading import (
    LoadedGroups,
    LoadedState,
    cloned,
    copied,
    number_of,
    options_of,
    restore,
    unusable_is_value_error,
)
from descend.core import memory
from descend.core.codecs import COMPENSATION, MIN_NUMEL, SCALE, Codec, Rounded, element_dtype, scale_shape
from descend.core.coded import decoded, encoded, fault_of, negative_scale
from descend.core.memory import as_real, row_state_shape
from descend.core.method import Method
from descend.core.optimizer import MethodOptimizer, is_option
from descend.core.signature import signature
from descend.distributed.dtensors import (
    has_whole_rows,
    is_dtensor,
    like,
    local_of,
    rows_of,
)
from descend.distributed.shard_state import as_sharded
from descend.offload.host_params import where_state_is
from descend.sparse import table
from descend.state.container import InitialState, new_scales


class _MisfitError(ValueError):
    """Saved state that belongs to another parameter or another optimizer; ``strict=False`` leaves it aside."""


def save(optimizer: MethodOptimizer, pack: Callable[[MethodOptimizer], dict[str, Any]]) -> dict[str, Any]:
    """The dictionary of ``pack``, torch's ``state_dict``, with new inner dicts and tensors on the same memory."""
    exposed = getattr(optimizer.state, "exposed", True)
    packed = pack(optimizer)
    hooks = optimizer._optimizer_state_dict_pre_hooks or optimizer._optimizer_state_dict_post_hooks
    if not exposed and not hooks and not any(group.get("differentiable") for group in optimizer.param_groups):
        # The caller gets new dicts and tensors, so nobody outside holds the state itself.
        packed["state"] = {index: _aliases(state) for index, state in packed["state"].items()}
        optimizer.state.exposed, optimizer.state.was_saved = False, True  # type: ignore[attr-defined]
    if any(type(state) is InitialState for state in dict.values(optimizer.state)):  # files contain plain dicts only
        packed["state"] = {
            index: dict(state) if type(state) is InitialState else state for index, state in packed["state"].items()
        }
    return packed


def _aliases(state: Mapping[str, Any]) -> dict[str, Any]:
    """A new dict with new tensors on the same memory."""
    return {name: _alias(value) if isinstance(value, Tensor) else value for name, value in state.items()}


def _alias(tensor: Tensor) -> Tensor:
    return like(tensor, local_of(tensor).detach()) if is_dtensor(tensor) else tensor.detach()


def load(
    optimizer: MethodOptimizer,
    state_dict: Mapping[str, Any],
    strict: bool,
    match: Match,
    hyperparameters: Hyperparameters,
) -> IncompatibleKeys | None:
    """See ``FirstOrder.load_state_dict``."""
    check_choices(type(optimizer).__name__, match, hyperparameters)
    reading = _Reading(optimizer, strict, match, hyperparameters)
    restore(optimizer, state_dict, reading)
    return None if strict else IncompatibleKeys(reading.missing, reading.unexpected)


class _Reading:
    """Reads groups and state for one optimizer from one state dictionary, and changes neither.

    Attributes:
        missing, unexpected: as in ``IncompatibleKeys``.
    """

    def __init__(
        self, optimizer: MethodOptimizer, strict: bool, match: Match, hyperparameters: Hyperparameters
    ) -> None:
        self.optimizer, self.strict, self.match = optimizer, strict, match
        self.takes_options = hyperparameters == "loaded"
        self._is_lazy = optimizer.options.sparse is not None
        self.who = type(optimizer).__name__
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self._losses = Losses()
        self._needs: dict[tuple[int, Any], set[str]] = {}  # by group and rule

    def __call__(self, state_dict: Mapping[str, Any]) -> tuple[LoadedGroups, LoadedState]:
        saved_groups = state_dict["param_groups"]
        matching = Matching(self.who, self.optimizer.param_groups, saved_groups, self.match)
        if self.strict:
            matching.require_all()
        groups = self._groups(saved_groups, matching)
        state = self._state(state_dict["state"], saved_groups, groups, matching)
        self._losses.warn(self.who)
        return groups, state

    # Groups.

    def _groups(self, saved_groups: list[Mapping[str, Any]], matching: Matching) -> LoadedGroups:
        groups: LoadedGroups = [{**group} for group in self.optimizer.param_groups]
        clone = cache(cloned)  # a tensor that groups share, such as lr, is shared by their copies
        if self.takes_options or any(method.group_state for method, _ in self.optimizer.methods()):
            for group, source in zip(groups, matching.group_sources(self.strict), strict=True):
                if source is not None:
                    self._load_options(group, saved_groups[source], source, clone)
        names = matching.saved.own_names
        if names and None not in matching.sources and all("param_names" in group for group in saved_groups):
            # As in torch, parameters without names get those of the dictionary.
            for index, group in enumerate(groups):
                here = [i for i, owner in enumerate(matching.here.groups) if owner == index]
                group.setdefault("param_names", [names[matching.sources[i]] for i in here])  # type: ignore[index]
        return groups

    def _is_same_method(self, group: Mapping[str, Any], saved: Mapping[str, Any], what: str) -> bool:
        """Whether a group and a saved one have the same method, as far as the file says.

        Raises:
            ValueError: if they have not, and everything shall be loaded.
        """
        own = type(self.optimizer).__name__.lower()
        if "method" not in saved and (foreign := self._foreign_options(group, saved)):
            if self.strict:
                raise ValueError(
                    f"{self.who}: {what} of the loaded state dict has {listed(foreign)}, which the method "
                    f"{group['method']!r} has not: is it another optimizer's? strict=False leaves it aside."
                )
            return False
        here, there = group.get("method", own), saved.get("method", group.get("method", own))
        if here != there and self.strict:
            raise ValueError(
                f"{self.who}: {what} of the loaded state dict has the method {there!r}, here it is {here!r}. "
                "strict=False leaves it aside, and its parameters begin anew."
            )
        return bool(here == there)

    def _foreign_options(self, group: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
        """Options of a saved group without a method that show it to be of another one than the group's."""
        if "method" not in group:  # then both are the optimizer's own
            return []
        known = self.optimizer.method_of(group).defaults
        return [key for key in options_of(saved) if key not in known and is_option(key)]

    def _load_options(
        self, group: dict[str, Any], saved: Mapping[str, Any], source: int, clone: Callable[[Tensor], Tensor]
    ) -> None:
        if self._is_same_method(group, saved, f"group {source}"):
            method = self.optimizer.method_of(group)
            options = self._options(method, saved, source, clone)
            if not self.takes_options:
                options = {key: options[key] for key in method.group_state if key in options}
            group.update(options)
            self._check_options(method, group, source)

    def _options(
        self, method: Method, saved: Mapping[str, Any], source: int, clone: Callable[[Tensor], Tensor]
    ) -> dict[str, Any]:
        defaults = method.defaults
        needed = [name for name, default in defaults.items() if not (default is None or isinstance(default, bool))]
        lacking = [name for name in needed if name not in saved]
        if self.strict and lacking:
            raise ValueError(
                f"{self.who}: group {source} of the loaded state dict lacks {listed(lacking)}: is it another "
                "optimizer's? hyperparameters='current' keeps this optimizer's options, strict=False those that lack."
            )
        return {key: value for key, value in options_of(saved, clone).items() if key != "method"}

    def _check_options(self, method: Method, group: Mapping[str, Any], source: int) -> None:
        for name, default in method.defaults.items():
            value = group.get(name)
            if isinstance(default, bool) and not (isinstance(value, int | np.bool_) and value in (0, 1)):
                raise ValueError(
                    f"{self.who}: {name} of group {source} of the loaded state dict must be True or False, "
                    f"got {value!r}."
                )
        with unusable_is_value_error(self.who, source):
            method.check_group(group)
            for name in method.defaults:
                value = group.get(name)
                values = value if isinstance(value, tuple | list) else (value,)
                if any(isinstance(each, Real) and each != each for each in values):
                    raise ValueError(f"{self.who}: {name} must be a number, got nan.")
            scalar_state = [torch.ones((), device="cpu") for _ in method.scalar_state]
            if "train_mode" in group:  # a schedule-free optimizer may be saved in eval mode, where it cannot step
                group = {**group, "train_mode": True}
            # Some options have an effect from the second step on only.
            for scalar in method.scalars_and_state(group, 2, scalar_state)[0]:
                float(scalar.item() if isinstance(scalar, Tensor) else scalar)

    # State.

    def _state(
        self,
        saved_state: Mapping[Any, Any],
        saved_groups: list[Mapping[str, Any]],
        groups: LoadedGroups,
        matching: Matching,
    ) -> LoadedState:
        keys = [key for group in saved_groups for key in group["params"]]
        params = [param for group in groups for param in group["params"]]
        self._check_keys(params, keys, matching)
        unexpected = set(matching.unexpected)
        loaded: LoadedState = defaultdict(dict)
        for i, (param, source) in enumerate(zip(params, matching.sources, strict=True)):
            owner = matching.here.groups[i]
            try:
                if source is None:
                    raise _MisfitError
                group, name = groups[owner], matching.here.label(i)
                if not self._is_same_method(group, saved_groups[matching.saved.groups[source]], f"the group of {name}"):
                    raise _MisfitError
                if keys[source] in saved_state:
                    loaded[param] = self._param_state(param, group, saved_state[keys[source]], name)
                    rule = self.optimizer.method_of(group).rule_of(param, group)
                    if table.NAMES.isdisjoint(signature(rule).state):
                        self._check_rows(loaded[param], name)
            except _MisfitError as error:
                if self.strict:
                    raise ValueError(str(error)) from None
                self.missing.append(matching.here.label(i))
                if source is not None:
                    unexpected.add(source)
                current = dict.get(self.optimizer.state, param)
                if current is not None:
                    loaded[param] = current
        self.unexpected.extend(map(matching.saved.label, sorted(unexpected)))
        self._read_others(saved_state, set(keys), matching.saved.are_keys, loaded)
        return loaded

    def _check_keys(self, params: list[Tensor], keys: list[Any], matching: Matching) -> None:
        """Raise ``ValueError`` unless each parameter has one state, and each state one parameter."""
        pairs = {(param, keys[i]) for param, i in zip(params, matching.sources, strict=True) if i is not None}
        if len(pairs) != len({param for param, _ in pairs}) or len(pairs) != len({key for _, key in pairs}):
            raise ValueError(
                f"{self.who}: the loaded state dict has one state for several parameters, or several for one."
            )

    def _read_others(
        self, saved_state: Mapping[Any, Any], keys: set[Any], keys_are_names: bool, loaded: LoadedState
    ) -> None:
        """Read state that belongs to no parameter, as torch does; refuse that of a parameter which no group lists."""
        kind = str if keys_are_names else int
        for key in saved_state:
            if key not in keys and not isinstance(key, kind):
                loaded[key] = copied(saved_state[key], cloned)
            elif key not in keys:
                if self.strict:
                    raise ValueError(
                        f"{self.who}: the loaded state dict has state for parameter {key!r}, which is in none of its "
                        "groups. strict=False leaves it aside."
                    )
                self.unexpected.append(f"state[{key!r}]")

    def _param_state(
        self, param: Tensor, group: Mapping[str, Any], saved: Mapping[str, Any], name: str
    ) -> dict[str, Any]:
        method = self.optimizer.method_of(group)
        if all(value is None for value in saved.values()) and not ("step" in saved and method.counts_steps):
            return dict(saved)
        names = signature(method.rule_of(param, group)).state
        scales = {key + SCALE: self._scale_of(key, saved, param, name) for key in names}
        if lacking := sorted(key for key in self._needed(param, group) if saved.get(key) is None):
            raise _MisfitError(
                f"{self.who}: the loaded state of {name} lacks {listed(lacking)}, and has {listed(saved)}: is it "
                "another optimizer's? strict=False leaves such state aside."
            )
        state: dict[str, Any] = {}
        for key, value in saved.items():
            if key in names and isinstance(value, Tensor):
                state.update(self._rule_state(method, param, group, key, value, scales[key + SCALE], name))
            elif key == COMPENSATION and key not in names:
                state.update(self._compensation(method, param, value, name))
            elif scales.get(key) is None and (key != "step" or method.counts_steps):
                state[key] = self._entry(method, param, key, value, key in names, name)
        return state

    def _scale_of(self, key: str, saved: Mapping[str, Any], param: Tensor, name: str) -> Tensor | None:
        """The scales of saved state called ``key``; None if it is not coded.

        Raises:
            ValueError: if codes and scales do not belong together.
        """
        codes, scale = (value if isinstance(value, Tensor) else None for value in map(saved.get, (key, key + SCALE)))
        if fault := fault_of(key, codes, scale):
            raise ValueError(f"{self.who}: the loaded state of {name}: {fault}.")
        if scale is not None:
            _check_memory(local_of(scale), local_of(param), f"{self.who}: the loaded {key + SCALE} of {name}")
            if not is_dtensor(scale):
                self._check_scale(key, scale, name)
        return scale

    def _check_scale(self, key: str, scale: Tensor, name: str) -> None:
        """Raise ``ValueError`` for a negative scale; of sharded ones when ranks have nothing more to say."""
        if fault := negative_scale(key, scale):
            raise ValueError(f"{self.who}: the loaded state of {name}: {fault}.")

    def _check_rows(self, state: Mapping[str, Any], name: str) -> None:
        """Raise ``ValueError`` if the rows of a table are described wrongly, or are behind and would stay so."""
        try:
            table.check_loaded(state)
        except ValueError as error:
            raise ValueError(f"{self.who}: the state of {name}: {error}") from None
        if self.optimizer.options.sparse != "exact" and table.is_behind(state):
            raise ValueError(
                f"{self.who}: the loaded state of {name} has rows that are behind, which only sparse='exact' "
                "can bring up to date. Call settle() of the optimizer that made it before saving."
            )

    def _needed(self, param: Tensor, group: Mapping[str, Any]) -> set[str]:
        """State that a parameter needs whatever the options; an option that was just turned on may add to it."""
        method = self.optimizer.method_of(group)
        rule = method.rule_of(param, group)
        if (known := self._needs.get((id(group), rule))) is not None:
            return known
        needed = set(signature(rule).state)
        for name in method.defaults:
            if isinstance(group[name], int | float):
                with suppress(ValueError):  # options that the method refuses
                    needed &= set(signature(method.rule_of(param, {**group, name: 0})).state)
        needed = needed.difference(method.optional_state).union(
            method.scalar_state, ["step"] if method.counts_steps and not method.counts_for_noise else []
        )
        self._needs[id(group), rule] = needed
        return needed

    def _entry(self, method: Method, param: Tensor, key: str, value: Any, in_rule: bool, name: str) -> Any:
        """One entry of a state that is no tensor of the rule's."""
        what = f"{self.who}: the loaded {key} of {name}"
        if isinstance(value, Tensor) and value.dim() == 0:
            value = local_of(value)
        if key == "step":
            step = number_of(value, what, is_count=True)
            if not float(step).is_integer():
                raise ValueError(f"{what} must be a whole number, got {float(step)}.")
            return step
        if key in method.scalar_state:
            number = number_of(value, what)
            self._check_sign(method, key, number, what)
            return number
        if not isinstance(value, Tensor):
            if in_rule and value is not None:
                raise ValueError(f"{what} must be a tensor, got {type(value).__name__}.")
            return copied(value, lambda tensor: tensor.detach().to(self._owner(param).device, copy=True))
        value, owner = value.to_dense() if value.is_sparse else value, self._owner(param)
        if key.endswith(SCALE) and value.shape == scale_shape(owner.shape):
            owner = new_scales(owner)  # of state that the rule would have with another option
        owner = owner if value.shape == owner.shape else local_of(owner)
        _check_memory(local_of(value), local_of(owner), what)
        part = part_for(owner, value, what)
        return in_place_of(owner, self._foreign(method, local_of(owner), key, part, what))

    def _foreign(self, method: Method, param: Tensor, key: str, value: Tensor, what: str) -> Tensor:
        """A tensor that the rule does not know; ``param`` and ``value`` are plain, or this rank's parts."""
        try:
            of_table = table.loaded(key, value.detach(), param)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None
        if of_table is not None:
            return of_table
        is_number = value.is_floating_point() or (value.is_complex() and param.is_complex())
        if is_number and value.shape == param.shape:
            return placed(value.detach(), wider(value, method.dtype_of_state(key, param)), param, self._is_lazy)
        return value.detach().to(param.device, copy=True)

    def _rule_state(
        self,
        method: Method,
        param: Tensor,
        group: Mapping[str, Any],
        key: str,
        value: Tensor,
        scale: Tensor | None,
        name: str,
    ) -> dict[str, Tensor]:
        """State of the rule, as this optimizer would store it; no dtype is narrowed that was not asked for."""
        what = f"{self.who}: the loaded {key} of {name}"
        shape, owner = method.state_shape(key, param, group), self._owner(param)
        format, codec = method.format_of_state(key, param, group), method.codec_of(key)
        if owner.shape != shape:
            is_of_rows = shape == row_state_shape(owner) and has_whole_rows(owner)
            owner = rows_of(owner) if is_dtensor(owner) and is_of_rows else local_of(owner)
        value = (value.to_dense() if value.is_sparse else value).detach()  # torch's momentum of sparse gradients
        _check_memory(local_of(value), local_of(owner), what)
        if scale is None and not (value.is_floating_point() or (value.is_complex() and param.is_complex())):
            raise ValueError(f"{what} must hold numbers as the parameter does ({param.dtype}), got {value.dtype}.")
        if value.shape != shape:
            raise self._misfit(what, value, shape)
        if scale is None and value.numel() >= MIN_NUMEL and looks_coded(local_of(value)):
            raise ValueError(
                f"{what} has only whole numbers from 0 to 255: codes of 8 bits, which torch.distributed.checkpoint has "
                f"cast to {dtype_name(value.dtype)}? It takes no other formats than those of the checkpoint. Load into "
                "an optimizer with the checkpoint's state_dtype; this one then loads its state_dict()."
            )
        if scale is not None and isinstance(format, Codec):
            codes, scales = part_for(owner, value, what), part_for(new_scales(owner), scale.detach(), what)
            self._check_scale(key, scales, name)
            return self._coded(key, owner, codes, scales)
        if scale is not None:
            was, value = "8 bits", decoded_on_ranks(value, scale.detach(), codec, what)
        else:
            was = dtype_name(value.dtype)
            if not is_dtensor(value):
                self._check_sign(method, key, value, what)  # of the whole: every rank raises, or none
        part, local = part_for(owner, value, what), local_of(owner)
        self._check_sign(method, key, part, what)
        if scale is not None:
            self._check_scale(key, local_of(scale), name)
        if isinstance(format, Codec):
            codes, scales = encoded(part.to(local.device), format)
            if is_lossy(part, decoded(codes, scales, format)):
                self._losses.add(key, f"{was} -> 8 bits")
            return self._coded(key, owner, codes, scales)
        dtype, asked = element_dtype(format), self.optimizer.options.state_dtype_of(key)
        stored = placed(part, dtype if dtype == asked else wider(part, dtype), local, self._is_lazy)
        if wider(part, stored.dtype) != stored.dtype and is_lossy(part, stored):
            self._losses.add(key, f"{was} -> {dtype_name(stored.dtype)}")
        return {key: in_place_of(owner, stored)}

    def _coded(self, key: str, owner: Tensor, codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
        """State in 8 bits; ``codes`` and ``scales`` are plain, or this rank's parts."""
        blocks = new_scales(owner)
        return {
            key: in_place_of(owner, placed(codes, torch.uint8, local_of(owner), self._is_lazy)),
            key + SCALE: in_place_of(blocks, placed(scales, torch.float32, local_of(blocks), self._is_lazy)),
        }

    def _compensation(self, method: Method, param: Tensor, value: Any, name: str) -> dict[str, Any]:
        """What rounding has taken from a bfloat16 parameter, if this optimizer uses it."""
        what = f"{self.who}: the loaded {COMPENSATION} of {name}"
        is_ours = isinstance(value, Tensor) and value.dtype == torch.int16
        if method.format_of_param(param) != Rounded("compensated"):
            if not is_ours:
                return {COMPENSATION: self._entry(method, param, COMPENSATION, value, False, name)}
            if local_of(value).any():
                self._losses.add(COMPENSATION, "left out: it is for bfloat16 and rounding='compensated'")
            return {}
        if value is None:
            return {}
        if not is_ours:
            raise ValueError(f"{what} must be a tensor of torch.int16, got {getattr(value, 'dtype', value)!r:.40}.")
        owner = self._owner(param)
        _check_memory(local_of(value), local_of(owner), what)
        if value.shape != param.shape:
            raise self._misfit(what, value, param.shape)
        part = part_for(owner, value.detach(), what)
        return {COMPENSATION: in_place_of(owner, placed(part, torch.int16, local_of(owner), self._is_lazy))}

    def _owner(self, param: Tensor) -> Tensor:
        """A tensor that lies where the state of ``param`` is to lie: on the ranks, and in the host's memory."""
        return where_state_is(self.optimizer, as_sharded(self.optimizer, param))

    def _misfit(self, what: str, value: Tensor, shape: torch.Size) -> _MisfitError:
        hint = "" if self.optimizer.param_groups[0].get("param_names") else " Were the parameters in another order?"
        return _MisfitError(f"{what} has shape {tuple(value.shape)}, expected {tuple(shape)}.{hint}")

    def _check_sign(self, method: Method, key: str, value: Tensor | float, what: str) -> None:
        """Raise ``ValueError`` for a negative value in state that no step makes negative."""
        if key in method.nonnegative_state and (smallest := _smallest(value)) < 0:
            raise ValueError(f"{what} must be >= 0, got {smallest}.")


def _smallest(value: Tensor | float) -> float:
    """The smallest value; 0 for tensors that cannot be compared (float8, on meta) or are not plain."""
    if not isinstance(value, Tensor):
        return value
    if type(value) not in memory.PLAIN or value.is_meta or value.itemsize == 1 or not value.numel():
        return 0.0
    return float(as_real(value.detach()).amin())


def _check_memory(value: Tensor, param: Tensor, what: str) -> None:
    """Raise ``ValueError`` for a tensor whose values cannot be read."""
    if value.layout is not torch.strided:
        raise ValueError(f"{what} must be a dense tensor, got layout {value.layout}.")
    if (value.is_meta and not param.is_meta) or memory.is_freed(value):
        raise ValueError(f"{what} has no values: its memory was never allocated, or has been freed.")
