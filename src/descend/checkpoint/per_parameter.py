"""Saving and loading of optimizers that keep a state for each parameter: matched, checked, never narrowed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from descend.checkpoint.matching import IncompatibleKeys, Matching, check_choices, listed
from descend.checkpoint.reading import (
    Groups,
    States,
    cloned,
    copied,
    number_of,
    options_of,
    restore,
    unusable_is_value_error,
)
from descend.core import memory
from descend.core.signature import signature
from descend.sparse import table
from descend.state import lazy_memory
from descend.state.container import Initial

if TYPE_CHECKING:
    from descend.first_order.optimizer import FirstOrder


class _MisfitError(ValueError):
    """A parameter's saved state that may be in order, but is not this parameter's."""


def save(optimizer: FirstOrder, pack: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Torch's dictionary, which ``pack`` makes, without handing out what the optimizer itself holds."""
    exposed = getattr(optimizer.state, "exposed", True)
    packed = pack()
    hooks = optimizer._optimizer_state_dict_pre_hooks or optimizer._optimizer_state_dict_post_hooks
    if not exposed and not hooks and not any(group.get("differentiable") for group in optimizer.param_groups):
        # What is handed out are fresh dicts and tensors, so nobody outside holds the state itself.
        packed["state"] = {index: _aliases(state) for index, state in packed["state"].items()}
        optimizer.state.exposed = False  # type: ignore[attr-defined]
    if any(type(state) is Initial for state in dict.values(optimizer.state)):  # files hold no classes of ours
        packed["state"] = {
            index: dict(state) if type(state) is Initial else state for index, state in packed["state"].items()
        }
    return packed


def _aliases(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same state in a new dict, its tensors as new tensors on the same memory."""
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in state.items()}


def load_state_dict(
    self: FirstOrder,
    state_dict: Mapping[str, Any],
    strict: bool = True,
    match: str = "auto",
    hyperparameters: str = "loaded",
) -> IncompatibleKeys | None:
    """Load what ``state_dict`` (this library's or torch's) returned.

    Everything is copied. A state tensor gets the wider of its saved dtype and the one this optimizer would make;
    integers stay as they are. How to run (``foreach``, ``fused``, ``capturable``, ``differentiable``) is not taken
    from the dictionary.

    Args:
        state_dict: a dictionary.
        strict: whether every parameter, here and there, must have its counterpart. Otherwise what matches is loaded,
            and the other parameters keep the state they have. Default: True.
        match: ``"name"``, an error where names are missing; ``"order"``; or ``"auto"``: by name if every parameter
            has one on both sides, else by order. Default: ``"auto"``.
        hyperparameters: options of the groups: ``"loaded"`` takes them from the dictionary, ``"current"`` keeps lr,
            weight decay and the rest as they are. Default: ``"loaded"``.
    Returns:
        None; with ``strict=False`` what was not loaded: ``(missing_keys, unexpected_keys)``.
    Raises:
        TypeError, ValueError: if something does not fit or is damaged; nothing has been changed then.
    Example:
        >>> from descend import AdamW
        >>> old, new = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        >>> optimizer = AdamW(new, lr=0.1)
        >>> optimizer.load_state_dict(AdamW(old, lr=0.5).state_dict(), strict=False, hyperparameters="current")
        IncompatibleKeys(missing_keys=[], unexpected_keys=[])
        >>> optimizer.param_groups[0]["lr"]
        0.1
    """
    check_choices(type(self).__name__, match, hyperparameters)
    reading = _Reading(self, strict, match, hyperparameters)
    restore(self, state_dict, reading)
    return None if strict else IncompatibleKeys(reading.missing, reading.unexpected)


def init_state(self: FirstOrder) -> None:
    """Make the state of all parameters that require gradients, without a step.

    ``torch.distributed.checkpoint`` loads into the state that is there; where there is none, it takes a step to get it.
    The next step is the first one all the same.

    Example:
        >>> from descend import AdamW
        >>> optimizer = AdamW([torch.zeros(2, requires_grad=True)])
        >>> optimizer.init_state()
        >>> optimizer.state_dict()["state"][0]
        {'step': tensor(0.), 'exp_avg': tensor([0., 0.]), 'exp_avg_sq': tensor([0., 0.])}
    """
    for group in self.param_groups:
        rule = self.rule_for(group)
        for param in group["params"]:
            if param.requires_grad:
                found = dict.get(self.state, param)
                made = self.ensure_state(param, rule, group, lazy=self.sparse is not None)
                if made and not self.counts_steps and (not found or type(found) is Initial):
                    dict.__setitem__(self.state, param, Initial(made))
    self._plan = None


class _Reading:
    """Groups and state for one optimizer from one state dictionary; changes neither.

    Attributes:
        missing, unexpected: as in ``IncompatibleKeys``.
    """

    def __init__(self, optimizer: FirstOrder, strict: bool, match: str, hyperparameters: str) -> None:
        self.optimizer, self.strict, self.match = optimizer, strict, match
        self.takes_options = hyperparameters == "loaded"
        self.who = type(optimizer).__name__
        self.missing: list[str] = []
        self.unexpected: list[str] = []

    def __call__(self, state_dict: Mapping[str, Any]) -> tuple[Groups, States]:
        saved_groups = state_dict["param_groups"]
        matching = Matching(self.who, self.optimizer.param_groups, saved_groups, self.match)
        if self.strict:
            matching.require_all()
        groups = self._groups(saved_groups, matching)
        state = self._state(state_dict["state"], saved_groups, groups, matching)
        return groups, state

    # Groups.

    def _groups(self, saved_groups: list[Mapping[str, Any]], matching: Matching) -> Groups:
        groups: Groups = [{**group} for group in self.optimizer.param_groups]
        counts = self.optimizer.counts
        if self.takes_options or counts:
            for group, source in zip(groups, matching.group_sources(self.strict), strict=True):
                if source is not None:
                    options = self._options(saved_groups[source], source)
                    group.update(
                        options if self.takes_options else {key: options[key] for key in counts if key in options}
                    )
                    self._check_options(group, source)
        names = matching.saved.own_names
        if names and None not in matching.sources and all("param_names" in group for group in saved_groups):
            # As in torch: names of the dictionary for parameters that have none.
            for index, group in enumerate(groups):
                here = [i for i, owner in enumerate(matching.here.groups) if owner == index]
                group.setdefault("param_names", [names[matching.sources[i]] for i in here])  # type: ignore[index]
        return groups

    def _options(self, saved: Mapping[str, Any], source: int) -> dict[str, Any]:
        defaults = self.optimizer.defaults
        needed = [name for name, default in defaults.items() if not (default is None or isinstance(default, bool))]
        lacking = [name for name in needed if name not in saved]
        if self.strict and lacking:
            raise ValueError(
                f"{self.who}: group {source} of the loaded state dict lacks {listed(lacking)}: is it another "
                "optimizer's? hyperparameters='current' keeps this optimizer's options, strict=False those that lack."
            )
        return options_of(saved)

    def _check_options(self, group: Mapping[str, Any], source: int) -> None:
        for name, default in self.optimizer.defaults.items():
            value = group.get(name)
            if isinstance(default, bool) and not (isinstance(value, int | np.bool_) and value in (0, 1)):
                raise ValueError(
                    f"{self.who}: {name} of group {source} of the loaded state dict must be True or False, "
                    f"got {value!r}."
                )
        with unusable_is_value_error(self.who, source):
            self.optimizer.check_group(group)
            kept = [torch.ones(()) for _ in self.optimizer.keeps]
            if "train_mode" in group:  # a schedule-free optimizer saved between two epochs
                group = {**group, "train_mode": True}
            # Some options only count from the second step on.
            for number in self.optimizer.scalars_and_kept(group, 2, kept)[0]:
                float(number.item() if isinstance(number, Tensor) else number)

    # State.

    def _state(
        self,
        saved_state: Mapping[Any, Any],
        saved_groups: list[Mapping[str, Any]],
        groups: Groups,
        matching: Matching,
    ) -> States:
        keys = [key for group in saved_groups for key in group["params"]]
        params = [param for group in groups for param in group["params"]]
        self._check_keys(params, keys, matching)
        needed = [self._needed(group) for group in groups]
        unexpected = set(matching.unexpected)
        loaded: States = defaultdict(dict)
        for i, (param, source) in enumerate(zip(params, matching.sources, strict=True)):
            owner = matching.here.groups[i]
            try:
                if source is None:
                    raise _MisfitError
                if keys[source] in saved_state:
                    rule, name = self.optimizer.rule_for(groups[owner]), matching.here.place(i)
                    loaded[param] = self._param_state(param, rule, needed[owner], saved_state[keys[source]], name)
                    if table.NAMES.isdisjoint(signature(rule).state):
                        self._check_rows(loaded[param], name)
            except _MisfitError as error:
                if self.strict:
                    raise ValueError(str(error)) from None
                self.missing.append(matching.here.place(i))
                if source is not None:
                    unexpected.add(source)
                kept = dict.get(self.optimizer.state, param)
                if kept is not None:
                    loaded[param] = kept
        self.unexpected.extend(map(matching.saved.place, sorted(unexpected)))
        self._read_others(saved_state, set(keys), matching.saved.are_keys, loaded)
        return loaded

    def _check_keys(self, params: list[Tensor], keys: list[Any], matching: Matching) -> None:
        """Raise ``ValueError`` unless parameters and states pair up, whatever is listed twice."""
        pairs = {(param, keys[i]) for param, i in zip(params, matching.sources, strict=True) if i is not None}
        if len(pairs) != len({param for param, _ in pairs}) or len(pairs) != len({key for _, key in pairs}):
            raise ValueError(
                f"{self.who}: the loaded state dict has one state for several parameters, or several for one."
            )

    def _read_others(
        self, saved_state: Mapping[Any, Any], keys: set[Any], keys_are_names: bool, loaded: States
    ) -> None:
        """State of no parameter: kept, as in torch, unless its key is a parameter's that no group has."""
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
        self, param: Tensor, rule: Callable[..., Any], needed: set[str], saved: Mapping[str, Any], name: str
    ) -> dict[str, Any]:
        if all(value is None for value in saved.values()) and not ("step" in saved and self.optimizer.counts_steps):
            return dict(saved)
        if lacking := sorted(key for key in needed if saved.get(key) is None):
            raise _MisfitError(
                f"{self.who}: the loaded state of {name} lacks {listed(lacking)}, and has {listed(saved)}: is it "
                "another optimizer's? strict=False leaves such state aside."
            )
        rules = signature(rule).state
        return {key: self._entry(param, key, value, key in rules, name) for key, value in saved.items()}

    def _check_rows(self, state: Mapping[str, Any], name: str) -> None:
        """Raise ``ValueError`` if rows of a table are described wrongly, or are behind for good."""
        try:
            table.check_loaded(state)
        except ValueError as error:
            raise ValueError(f"{self.who}: the state of {name}: {error}") from None
        if self.optimizer.sparse != "exact" and table.is_behind(state):
            raise ValueError(
                f"{self.who}: the loaded state of {name} has rows that are behind, which only sparse='exact' "
                "can bring up to date. Call settle() of the optimizer that made it before saving."
            )

    def _needed(self, group: Mapping[str, Any]) -> set[str]:
        """State that the rule of a group needs whatever its options; the rest may have been turned on just now."""
        optimizer = self.optimizer
        needed = set(signature(optimizer.rule_for(group)).state)
        for name in optimizer.defaults:
            if isinstance(group[name], int | float):
                needed &= set(signature(optimizer.rule_for({**group, name: 0})).state)
        return needed | {"step"} if optimizer.counts_steps else needed

    def _entry(self, param: Tensor, key: str, value: Any, is_rules: bool, name: str) -> Any:
        what = f"{self.who}: the loaded {key} of {name}"
        if key == "step" and self.optimizer.counts_steps:
            return number_of(value, what, is_count=True)
        if key in self.optimizer.keeps and value is not None:
            return number_of(value, what)
        if not isinstance(value, Tensor):
            if is_rules and value is not None:
                raise ValueError(f"{what} must be a tensor, got {type(value).__name__}.")
            return copied(value, lambda tensor: tensor.detach().to(param.device, copy=True))
        if value.is_sparse:  # torch keeps the momentum of sparse gradients like that
            value = value.to_dense()
        _check_memory(value, param, what)
        if not is_rules:
            try:
                of_table = table.loaded(key, value.detach(), param)
            except ValueError as error:
                raise ValueError(f"{what}: {error}") from None
            if of_table is not None:
                return of_table
        is_number = value.is_floating_point() or (value.is_complex() and param.is_complex())
        if is_rules and not is_number:
            raise ValueError(f"{what} must hold numbers as the parameter does ({param.dtype}), got {value.dtype}.")
        if is_number and value.shape == param.shape:
            return self._widened(param, value.detach())
        if is_rules:
            hint = "" if self.optimizer.param_groups[0].get("param_names") else " Were the parameters in another order?"
            raise _MisfitError(f"{what} has shape {tuple(value.shape)}, expected {tuple(param.shape)}.{hint}")
        return value.detach().to(param.device, copy=True)

    def _widened(self, param: Tensor, value: Tensor) -> Tensor:
        dtype = self.optimizer.default_state_dtype(param)
        if value.itemsize > 1:  # torch promotes no float8, and everything is wider
            dtype = torch.promote_types(value.dtype, dtype)
        if self.optimizer.sparse is not None and param.is_cpu and param.is_contiguous():
            return lazy_memory.copied(value, dtype)
        # In the parameter's memory order, which is the one kernels walk.
        return torch.empty_like(param, dtype=dtype).copy_(value)


def _check_memory(value: Tensor, param: Tensor, what: str) -> None:
    """Raise ``ValueError`` for a tensor whose values cannot be read."""
    if value.layout is not torch.strided:
        raise ValueError(f"{what} must be a dense tensor, got layout {value.layout}.")
    if (value.is_meta and not param.is_meta) or memory.is_freed(value):
        raise ValueError(f"{what} has no values: its memory was never allocated, or has been freed.")
