"""Match the parameters of a state dictionary to those of an optimizer: by name if both have names, else by order.

Groups are dictionaries here; only their ``params`` and ``param_names`` are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

Match: TypeAlias = Literal["auto", "name", "order"]
Hyperparameters: TypeAlias = Literal["loaded", "current"]

# Wrappers of modules add these to the names of parameters; torch.distributed.checkpoint removes them as well.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_SHOWN = 5  # names in a message

ParamGroups: TypeAlias = Sequence[Mapping[str, Any]]


class IncompatibleKeys(NamedTuple):
    """What ``load_state_dict(..., strict=False)`` did not load.

    Attributes:
        missing_keys: parameters of the optimizer that kept their state, because the dictionary has none that fits.
        unexpected_keys: parameters of the dictionary whose state was ignored.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


class Listing:
    """The parameters of one side, an optimizer or a state dictionary, in the order of the groups.

    Args:
        groups: the groups of that side.
        names_in_keys: whether ``params`` may hold names, as in dictionaries of torch.distributed.
    Attributes:
        groups: index of each parameter's group.
        positions: index of each parameter within its group.
        own_names: names as given; None if a parameter has none.
        names: the same; None if a name repeats.
        bare_names: names without the additions of wrappers; None if such a name repeats.
        are_keys: whether the names were found in ``params``.
    """

    def __init__(self, groups: ParamGroups, names_in_keys: bool = False) -> None:
        self.groups = [index for index, group in enumerate(groups) for _ in group["params"]]
        self.positions = [position for group in groups for position, _ in enumerate(group["params"])]
        keys = [key for group in groups for key in group["params"]]
        self.are_keys = names_in_keys and bool(keys) and all(isinstance(key, str) for key in keys)
        names = keys if self.are_keys else [name for group in groups for name in group.get("param_names", ())]
        has_all = len(names) == len(keys) and all(isinstance(name, str) for name in names)
        self.own_names: list[str] | None = names if has_all else None
        self.names = _distinct(names) if has_all else None
        self.bare_names = _distinct(map(_bare, names)) if has_all else None

    def label(self, index: int) -> str:
        """The parameter's name, or its position in the groups."""
        if self.own_names:
            return self.own_names[index]
        return f"param_groups[{self.groups[index]}]['params'][{self.positions[index]}]"


class Matching:
    """Pairs of parameters, and of groups: those of an optimizer ("here") with those of a state dictionary ("saved").

    Args:
        who: name of the optimizer's class, for errors.
        groups: groups of the optimizer.
        saved_groups: groups of the state dictionary.
        match: ``"auto"``, ``"name"`` or ``"order"``.
    Attributes:
        sources: index, in the dictionary, of each parameter here; None if the dictionary lacks it.
        missing: indices of the parameters here that the dictionary lacks.
        unexpected: indices of the parameters of the dictionary that are not here.
    Raises:
        ValueError: if ``match`` is ``"name"`` and a name is missing or repeats.
    """

    def __init__(self, who: str, groups: ParamGroups, saved_groups: ParamGroups, match: str) -> None:
        self.who = who
        self.sizes = [len(group["params"]) for group in groups]
        self.saved_sizes = [len(group["params"]) for group in saved_groups]
        self.here, self.saved = Listing(groups), Listing(saved_groups, names_in_keys=True)
        names = self._names(match)
        self.by_name = names is not None
        keys: Sequence[Any]
        saved_keys: Sequence[Any]
        keys, saved_keys = names or [list(zip(s.groups, s.positions, strict=True)) for s in (self.here, self.saved)]
        index = {key: i for i, key in enumerate(saved_keys)}
        self.sources: list[int | None] = [index.get(key) for key in keys]
        self.missing = [i for i, source in enumerate(self.sources) if source is None]
        self.unexpected = sorted(set(range(len(saved_keys))) - set(self.sources))

    def _names(self, match: str) -> tuple[list[str], list[str]] | None:
        """The names to match by, here and saved; None to match by order."""
        if match == "order":
            return None
        here, saved = self.here.bare_names, self.saved.bare_names
        if not (here and saved):
            here, saved = self.here.names, self.saved.names
        if here and saved:
            # torch.distributed writes its keys in this optimizer's order, whatever the optimizer calls its parameters.
            is_order = match == "auto" and self.saved.are_keys and set(here).isdisjoint(saved)
            return None if is_order else (here, saved)
        if match == "name":
            lacking = "this optimizer" if not here else "the state dict"
            raise ValueError(
                f"{self.who}: match='name' needs a name of its own for every parameter, which {lacking} has not. Give "
                "the parameters as model.named_parameters(), before saving and before loading."
            )
        return None

    def require_all(self) -> None:
        """Raise ``ValueError`` unless every parameter, here and saved, has its counterpart."""
        if not self.by_name:
            self._require_same_number()
            if self.sizes != self.saved_sizes:
                index = next(i for i, size in enumerate(self.sizes) if size != self.saved_sizes[i])
                raise ValueError(
                    "loaded state dict contains a parameter group that doesn't match the size of optimizer's group "
                    f"({self.who}: group {index} has {self.saved_sizes[index]} parameters there, {self.sizes[index]} "
                    "here)"
                )
        elif self.missing or self.unexpected:
            missing = listed(map(self.here.label, self.missing))
            unexpected = listed(map(self.saved.label, self.unexpected))
            raise ValueError(
                f"{self.who}: the names differ: expected {missing}, which the loaded state dict lacks; it has "
                f"{unexpected} instead. strict=False loads what matches, match='order' ignores names."
            )

    def group_sources(self, strict: bool) -> list[int | None]:
        """For each group here, the index of the saved group that has its options; None if there is none.

        If the parameters of every group come from a single saved group, that group; else the one at the same position.
        """
        if strict or not self.by_name:
            self._require_same_number()
        origins: list[Counter[int]] = [Counter() for _ in self.sizes]  # how many parameters come from which saved group
        for group, source in zip(self.here.groups, self.sources, strict=True):
            if source is not None:
                origins[group][self.saved.groups[source]] += 1
        only = [next(iter(origin)) for origin in origins if len(origin) == 1]
        is_same_number = len(self.sizes) == len(self.saved_sizes)
        if all(len(origin) <= 1 for origin in origins) and (len(set(only)) == len(only) or not is_same_number):
            by_position = [i if is_same_number and i not in only else None for i in range(len(origins))]
            return [next(iter(origin), i) for origin, i in zip(origins, by_position, strict=True)]
        for index, origin in enumerate(origins):
            if not is_same_number or (origin and origin[index] < max(origin.values())):
                raise ValueError(
                    f"{self.who}: the parameters of group {index} were in the groups {sorted(origin)} of the loaded "
                    "state dict: whose options shall it have? hyperparameters='current' keeps those of this optimizer."
                )
        return list(range(len(origins)))

    def _require_same_number(self) -> None:
        if len(self.sizes) != len(self.saved_sizes):
            raise ValueError(
                "loaded state dict has a different number of parameter groups "
                f"({self.who}: {len(self.saved_sizes)} there, {len(self.sizes)} here). Where parameters have names, "
                "hyperparameters='current' loads the state and leaves the groups."
            )


def check_choices(who: str, match: str, hyperparameters: str) -> None:
    """Raise ``ValueError`` for an unknown ``match`` or ``hyperparameters``."""
    for name, value, choices in (("match", match, Match), ("hyperparameters", hyperparameters, Hyperparameters)):
        if value not in get_args(choices):
            raise ValueError(f"{who}: {name} must be one of {get_args(choices)}, got {value!r}.")


def listed(names: Iterable[str]) -> str:
    """The first few names, for a message."""
    names = list(names)
    more = [f"{len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return ", ".join([*map(repr, names[:_SHOWN]), *more]) or "none"


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _distinct(names: Iterable[str]) -> list[str] | None:
    names = list(names)
    return names if len(set(names)) == len(names) else None
