"""What a sample of ``Monitor`` holds: sums for each parameter, and the metrics made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from descend.core.measures import COLUMNS, Sample

Metrics = dict[str, float]

_AT = {name: position for position, name in enumerate(COLUMNS)}


class Names:
    """The parameters of an optimizer, and the layers and groups that they belong to.

    Args:
        groups: ``param_groups``.
        given: names of parameters, for groups that have none.
    Attributes:
        params: the parameters, in the order of the groups.
        of_params: their names.
        of_layers: the part of the names before the last dot; a name without a dot is a layer of its own.
        of_groups: the groups' positions, as text.
        layer: for each parameter, the position of its layer.
        group: for each parameter, the position of its group.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], given: Mapping[Tensor, str]) -> None:
        self.params: list[Tensor] = [param for group in groups for param in group["params"]]
        self.group = np.array([i for i, group in enumerate(groups) for _ in group["params"]], np.int64)
        names = []
        for i, group in enumerate(groups):
            listed = group.get("param_names") or [
                f"param_groups[{i}]['params'][{j}]" for j in range(len(group["params"]))
            ]
            names += [given.get(param, name) for param, name in zip(group["params"], listed, strict=True)]
        if len({*names}) < len({*map(id, self.params)}):  # two models with the same names
            names = [f"group{group}.{name}" for group, name in zip(self.group, names, strict=True)]
        self.of_params: tuple[str, ...] = tuple(names)
        layers = [name.rpartition(".")[0] or name for name in names]
        self.of_layers: tuple[str, ...] = tuple(dict.fromkeys(layers))
        position = {name: i for i, name in enumerate(self.of_layers)}
        self.layer = np.array([position[name] for name in layers], np.int64)
        self.of_groups: tuple[str, ...] = tuple(map(str, range(len(groups))))
        self._index = {id(param): i for i, param in enumerate(self.params)}
        self._last: tuple[Sequence[Tensor], np.ndarray] = ((), np.zeros(0, np.int64))

    def places(self, params: Sequence[Tensor]) -> np.ndarray:
        """The positions of parameters; -1 for one that has left the groups since it took its step, inside backward."""
        if self._last[0] is not params:  # a plan passes the same list at every step
            self._last = params, np.array([self._index.get(id(param), -1) for param in params], np.int64)
        return self._last[1]

    def fit(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the groups still have the same parameters."""
        params = [param for group in groups for param in group["params"]]
        sizes = [len(group["params"]) for group in groups]
        return (
            len(params) == len(self.params)
            and all(map(is_, params, self.params))
            and sizes == np.bincount(self.group, minlength=len(self.of_groups)).tolist()
        )


class Clipping(NamedTuple):
    """What clipping has done.

    Attributes:
        share: of the steps since the last sample, those whose norm exceeded ``max_norm``.
        coefficient: what the sampled step's gradients were multiplied by.
    """

    share: float
    coefficient: float


class Record:
    """One sample.

    Args:
        step: the step it was taken in; 1 is the first.
        names: the parameters.
        sample: what the step has measured.
        rates: the groups' learning rates; NaN for a group without.
        clipping: None without ``max_norm``.
        skipped: steps left out so far.
    Attributes:
        sums: a row a parameter, columns as in ``core.measures``; of parameters that took no step, zeros.
        stepped: for each parameter, whether it took a step.
        rows: for each parameter, how many rows its sparse gradient named; NaN for a dense one.
    """

    def __init__(
        self,
        step: int,
        names: Names,
        sample: Sample,
        rates: Sequence[float],
        clipping: Clipping | None,
        skipped: int,
    ) -> None:
        self.step, self.names, self.rates, self.clipping, self.skipped = step, names, rates, clipping, skipped
        count = len(names.params)
        self.sums = np.zeros((count, len(COLUMNS)))
        self.stepped = np.zeros(count, bool)
        self.rows = np.full(count, np.nan)
        for part in sample.parts:
            places = names.places(part.params)
            kept = places >= 0
            at = places[kept]
            sums = part.sums.cpu().double().numpy() if isinstance(part.sums, Tensor) else part.sums
            sums = sums[kept]
            sums[:, _AT["grad_sq"]] *= part.scale**2
            sums[:, _AT["ratio"]] *= part.corrections[kept]
            self.sums[at], self.stepped[at] = sums, True
            if part.rows is not None:
                self.rows[at] = float(part.rows)
        self.sums[np.array(rates)[names.group] == 0, _AT["lost"]] = 0  # nothing was to move

    def of_layers(self) -> np.ndarray:
        """The sums of each layer."""
        return _grouped(self.sums, self.names.layer, len(self.names.of_layers))

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers: see ``Monitor.read``."""
        details = {detail: self._detail(detail) for detail in ("groups", "layers", "params")}
        return {"step": self.step, **self._summary(), **details}

    def flat(self, detail: str) -> Metrics:
        """One number a name: ``"grad_norm"`` of everything, ``"grad_norm/NAME"`` of a layer or parameter.

        Args:
            detail: ``"layers"`` or ``"params"``.
        """
        found = self._detail(detail)
        parts = {f"{metric}/{name}": value for name, metrics in found.items() for metric, value in metrics.items()}
        return {**self._summary(), **parts}

    def _detail(self, detail: str) -> dict[str, Metrics]:
        """The metrics of all groups, layers or parameters that took a step."""
        names = self.names
        if detail == "params":
            found = _by_name(names.of_params, self.sums, self.stepped)
            for i in np.flatnonzero(~np.isnan(self.rows)):
                found[names.of_params[i]]["rows_named"] = float(self.rows[i])
            return found
        owner, of_owner = (names.group, names.of_groups) if detail == "groups" else (names.layer, names.of_layers)
        stepped = np.bincount(owner, self.stepped, len(of_owner)) > 0
        return _by_name(of_owner, _grouped(self.sums, owner, len(of_owner)), stepped)

    def _summary(self) -> Metrics:
        total = metrics_of(self.sums.sum(axis=0, keepdims=True))
        summary = {metric: float(values[0]) for metric, values in total.items() if not np.isnan(values[0])}
        if self.clipping is not None:
            summary |= {"clipped": self.clipping.share, "clip_coefficient": self.clipping.coefficient}
        return {**summary, "skipped_steps": float(self.skipped)}


def metrics_of(sums: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics that rows of sums make, by name; NaN for a ratio of which nothing is known, such as 0 / 0."""
    column = {name: sums[:, position] for name, position in _AT.items()}
    grad, update, weight = (np.sqrt(column[name]) for name in ("grad_sq", "update_sq", "weight_sq"))
    return {
        "grad_norm": grad,
        "update_norm": update,
        "weight_norm": weight,
        "update_ratio": _ratio(update, weight),
        "signal_to_noise": _ratio(column["ratio"], column["ratios"]),
        "lost_updates": _ratio(column["lost"], column["moving"]),
        "nonfinite_grads": column["bad_grads"],
        "nonfinite_weights": column["bad_weights"],
    }


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    ratio = np.full(len(above), np.nan)
    np.divide(above, below, out=ratio, where=below != 0)
    return ratio


def _grouped(sums: np.ndarray, owner: np.ndarray, count: int) -> np.ndarray:
    """Rows added by owner, in their order."""
    grouped = np.zeros((count, sums.shape[1]))
    np.add.at(grouped, owner, sums)
    return grouped


_NORMS = ("grad_norm", "update_norm", "weight_norm")  # known of whatever took a step, even if they are NaN


def _by_name(names: Sequence[str], sums: np.ndarray, stepped: np.ndarray) -> dict[str, Metrics]:
    """The metrics of all that took a step, as plain numbers; ratios of which nothing is known are left out."""
    metrics = metrics_of(sums)
    known = {metric: stepped & ((metric in _NORMS) | ~np.isnan(values)) for metric, values in metrics.items()}
    return {
        name: {metric: float(values[i]) for metric, values in metrics.items() if known[metric][i]}
        for i, name in enumerate(names)
        if stepped[i]
    }
