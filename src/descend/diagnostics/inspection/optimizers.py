"""Find the optimizers in a checkpoint, whatever wrote it, and the weights that belong to them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from descend.core.codecs import COMPENSATION, SCALE
from descend.diagnostics.inspection.coded import paired
from descend.diagnostics.inspection.state_names import FULL_SHAPED
from descend.diagnostics.inspection.stored import Stored, number
from descend.reporting.errors import UsageError

_DEPTH = 8  # of dictionaries in dictionaries that are looked into
_WRAPPERS = re.compile(r"(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OTHER_STATE = (
    "step",
    "eta",
    "mu",
    "mu_product",
    "row_var",
    "col_var",
    "row_step",
    "factors",
    "bases",
    COMPENSATION,
    *(name + SCALE for name in FULL_SHAPED),
)
_FLAT_STATE = re.compile(rf"(?:(.*)\.)?state\.(.+)\.({'|'.join((*FULL_SHAPED, *_OTHER_STATE))})")
_FLAT_OPTION = re.compile(r"(?:(.*)\.)?param_groups\.(.+)\.(\w+)")
_SCALARS = {"step", "eta", "mu", "mu_product"}

# What tells the methods apart, first match wins: names in the state, options that the group has, options it has not.
_METHODS: tuple[tuple[str, set[str], set[str], set[str]], ...] = (
    ("L-BFGS", set(), {"history_size"}, set()),
    ("AdamW schedule-free", {"z", "exp_avg_sq"}, set(), set()),
    ("Adan", {"exp_avg_diff"}, set(), set()),
    ("AdEMAMix", {"exp_avg_slow"}, set(), set()),
    ("MARS", {"exp_avg_sq", "previous_grad"}, set(), set()),
    ("Prodigy", {"exp_avg_sq", "p0"}, set(), set()),
    ("ADOPT", {"exp_avg_sq"}, {"clip_exp"}, set()),
    ("LAMB", {"exp_avg_sq"}, {"always_adapt"}, set()),
    ("SOAP", {"exp_avg_sq"}, {"precondition_frequency"}, set()),
    ("NAdam", {"exp_avg_sq"}, {"momentum_decay"}, set()),
    ("AdamW", {"exp_avg_sq"}, {"amsgrad", "decoupled_weight_decay"}, set()),
    ("Adam", {"exp_avg_sq"}, {"amsgrad"}, set()),
    ("RAdam", {"exp_avg_sq"}, {"decoupled_weight_decay"}, {"bias_correction"}),
    ("SparseAdam", {"exp_avg_sq"}, {"betas", "maximize"}, {"weight_decay"}),
    ("Adam", {"exp_avg_sq"}, {"betas", "eps"}, set()),
    ("Adamax", {"exp_inf"}, set(), set()),
    ("Adadelta", {"acc_delta"}, set(), set()),
    ("RMSprop", {"square_avg"}, {"alpha"}, set()),
    ("Adagrad", {"sum"}, {"lr_decay"}, set()),
    ("RowwiseAdagrad", {"sum"}, {"decoupled_weight_decay"}, set()),
    ("Rprop", {"prev", "step_size"}, set(), set()),
    ("ASGD", {"ax"}, set(), set()),
    ("Muon", {"momentum_buffer"}, {"ns_steps"}, set()),
    ("Adafactor", set(), {"beta2_decay"}, set()),
    ("Adafactor of transformers", set(), {"clip_threshold", "decay_rate"}, set()),
    ("SGD", set(), {"momentum", "dampening"}, set()),
    ("Lion", {"exp_avg"}, {"betas"}, {"eps"}),
)


@dataclass
class Param:
    """A parameter, as its optimizer's state describes it.

    Attributes:
        label: its name, or its number in the order of the groups.
        name: its name; None if the file has none.
        key: its key in the state dictionary.
        group: index of its group; None if it is in no group.
        scalars: the step count and other single numbers.
        tensors: the other state by name; several tensors for a history; state in 8 bits without its scales.
        faults: what is wrong with state in 8 bits.
        weight: the parameter itself, if the checkpoint has it.
    """

    label: str
    name: str | None
    key: Any
    group: int | None
    has_state: bool
    scalars: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, list[Stored]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    weight: Stored | None = None

    @property
    def step(self) -> float | None:
        """How many steps it has taken; None if the state does not say."""
        return self.scalars.get("step")

    @property
    def everything(self) -> dict[str, list[Stored]]:
        """The weight, if it is there, and all state tensors."""
        return {**({"weight": [self.weight]} if self.weight else {}), **self.tensors}

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Its shape: the weight's, else that of state that is shaped like it; None if neither is there."""
        if self.weight is not None:
            return self.weight.shape
        shaped = [self.tensors[name][0].shape for name in FULL_SHAPED if name in self.tensors]
        return shaped[0] if shaped else None


@dataclass
class SavedOptimizer:
    """An optimizer's state dictionary.

    Attributes:
        where: the keys that lead to it in the file; empty if the file is nothing else.
        method: what it looks like, by its options and state; empty if nothing fits.
        groups: the options of each group, without the list of its parameters.
        keys: the keys of each group's parameters.
        params: all parameters, in the order of the groups, then those that have state but no group.
        misnamed: groups whose list of names is not as long as that of parameters.
    """

    where: str
    method: str
    groups: list[dict[str, Any]]
    keys: list[list[Any]]
    params: list[Param]
    misnamed: list[int]

    @property
    def distinct(self) -> list[Param]:
        """All parameters, those that the groups list again left out."""
        return list({param.key: param for param in reversed(self.params)}.values())[::-1]

    @property
    def is_named(self) -> bool:
        """Whether names identify all parameters."""
        names = [param.name for param in self.params]
        return None not in names and len(set(names)) == len(names)


def find_optimizers(content: Any) -> list[SavedOptimizer]:
    """All optimizers in a checkpoint, in its order, with the weights that fit them.

    Raises:
        UsageError: if a dictionary is that of an optimizer, but not one that can be understood.
    """
    found, weights = [], []
    for where, node in _dictionaries(content):
        if {"state", "param_groups"} <= set(node):
            found.append(_optimizer(where, node["state"], node["param_groups"]))
        elif node and all(isinstance(key, str) and isinstance(value, Stored) for key, value in node.items()):
            weights.append(node)
        found += _flat_optimizers(where, node)
    for optimizer in found:
        _add_weights(optimizer, weights)
    return found


def _dictionaries(content: Any) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """All dictionaries, breadth first and each once, but none inside an optimizer."""
    level, seen = [("", content)], set()
    for _ in range(_DEPTH):
        below = []
        for where, node in level:
            if id(node) in seen or not isinstance(node, Mapping | list):
                continue
            seen.add(id(node))
            if isinstance(node, Mapping):
                yield where, node
                if {"state", "param_groups"} <= set(node):
                    continue
            entries = node.items() if isinstance(node, Mapping) else enumerate(node)
            below += [(f"{where}.{key}".lstrip("."), entry) for key, entry in entries]
        level = below


def _optimizer(where: str, state: Any, groups: Any) -> SavedOptimizer:
    who = f"the optimizer at {where!r}" if where else "the optimizer in it"
    if not isinstance(state, Mapping):
        raise UsageError(f"{who} is damaged: its state is a {type(state).__name__}, not a dictionary.")
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        raise UsageError(f"{who} is damaged: its param_groups are no list of dictionaries.")
    if all(isinstance(key, str) and key.isdecimal() for key in state):  # torch.distributed.checkpoint makes them so
        state = {int(key) if len(key) < 10 else key: content for key, content in state.items()}
    optimizer = SavedOptimizer(where, "", [], [], [], [])
    for index, group in enumerate(groups):
        keys = group.get("params")
        if not isinstance(keys, list) or not all(isinstance(key, int | str) for key in keys):
            raise UsageError(f"{who} is damaged: group {index} has no list 'params' of numbers or names.")
        names = group.get("param_names")
        if all(isinstance(key, str) for key in keys):
            names = keys
        elif not isinstance(names, list) or len(names) != len(keys):
            if names is not None:
                optimizer.misnamed.append(index)
            names = [None] * len(keys)
        options = {str(key): value for key, value in group.items() if key not in ("params", "param_names")}
        optimizer.groups.append(options)
        optimizer.keys.append(keys)
        for key, name in zip(keys, names, strict=True):
            optimizer.params.append(_param(key, None if name is None else str(name), index, state.get(key), who))
    known = {key for keys in optimizer.keys for key in keys}
    for key, content in state.items():
        # torch keeps state under strings that are no parameter's, whatever it is.
        if key not in known and isinstance(content, Mapping) and (isinstance(key, int) or not _are_numbers(known)):
            optimizer.params.append(_param(key, key if isinstance(key, str) else None, None, content, who))
    optimizer.method = _method(optimizer)
    return optimizer


def _are_numbers(keys: set[Any]) -> bool:
    return all(isinstance(key, int) for key in keys)


def _param(key: Any, name: str | None, group: int | None, state: Any, who: str) -> Param:
    if state is not None and not isinstance(state, Mapping):
        raise UsageError(f"{who} is damaged: the state of {key!r:.60} is a {type(state).__name__}, not a dictionary.")
    param = Param(name or f"#{key}", name, key, group, bool(state))
    for entry, value in (state or {}).items():
        single = number(value) if not isinstance(value, Stored) or entry in _SCALARS else None
        if single is not None:
            param.scalars[str(entry)] = single
        elif isinstance(value, Stored):
            param.tensors[str(entry)] = [value]
        elif isinstance(value, list) and (history := [item for item in value if isinstance(item, Stored)]):
            param.tensors[str(entry)] = history
    param.tensors, param.faults = paired(param.tensors)
    return param


def _flat_optimizers(where: str, node: Mapping[Any, Any]) -> list[SavedOptimizer]:
    """Optimizers whose dictionaries were flattened to keys such as ``state.layer.weight.exp_avg``."""
    states: dict[str, dict[str, dict[str, Any]]] = {}
    options: dict[str, dict[str, dict[str, Any]]] = {}
    for key, value in node.items():
        if not isinstance(key, str):
            continue
        for pattern, tree in ((_FLAT_STATE, states), (_FLAT_OPTION, options)):
            if match := pattern.fullmatch(key):
                prefix, name, entry = match.groups()
                tree.setdefault(prefix or "", {}).setdefault(name, {})[entry] = value
    found = []
    for prefix in dict.fromkeys([*states, *options]):
        of_params = options.get(prefix, {})
        groups: list[dict[str, Any]] = []
        for name in dict.fromkeys([*of_params, *states.get(prefix, {})]):
            given = of_params.get(name, {})
            group = next((g for g in groups if _same(g, given)), None)
            if group is None:
                groups.append(group := {**given, "params": []})
            group["params"].append(name)
        inside = ".".join(filter(None, (where, prefix)))
        found.append(_optimizer(inside, states.get(prefix, {}), groups))
    return found


def _same(group: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    def plain(value: Any) -> Any:
        single = number(value)
        return value if single is None else single

    return {key: plain(value) for key, value in group.items() if key != "params"} == {
        key: plain(value) for key, value in options.items()
    }


def _method(optimizer: SavedOptimizer) -> str:
    names = {name for param in optimizer.params for name in (*param.tensors, *param.scalars)}
    options = set(optimizer.groups[0]) if optimizer.groups else set()
    for method, state, there, absent in _METHODS:
        if state <= names and there <= options and not absent & options:
            decoupled = optimizer.groups[0].get("decoupled_weight_decay") if optimizer.groups else False
            return "Adam" if method == "AdamW" and not decoupled else method
    return ""


def _add_weights(optimizer: SavedOptimizer, candidates: list[Mapping[Any, Any]]) -> None:
    """Give parameters their weights: by name, or by order where numbers and shapes leave no doubt."""
    params = [param for param in optimizer.params if param.group is not None]
    for weights in candidates:
        by_name = {_WRAPPERS.sub("", name): weight for name, weight in weights.items()}
        if params and all(param.name is not None for param in params):
            matched = [by_name.get(_WRAPPERS.sub("", str(param.name))) for param in params]
            if any(weight is not None for weight in matched):
                for param, weight in zip(params, matched, strict=True):
                    param.weight = weight
                return
            continue
        trained = [
            (name, weight)
            for name, weight in by_name.items()
            if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        ]
        shapes = [param.shape for param in params]
        fits = len(trained) == len(params) and all(
            shape in (None, weight.shape) for shape, (_, weight) in zip(shapes, trained, strict=True)
        )
        # With params of several groups, the order of the model need not be that of the optimizer.
        if fits and (len(optimizer.groups) == 1 or None not in shapes):
            for param, (name, weight) in zip(params, trained, strict=True):
                param.weight = weight
                if len(optimizer.groups) == 1:
                    param.name, param.label = name, name
            return
