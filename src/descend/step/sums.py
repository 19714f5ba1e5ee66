"""Sums over tensors that are needed before a step, and the scalars that methods form of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from descend.core.method import MethodRef
from descend.core.optimizer import MethodOptimizer
from descend.core.signature import signature
from descend.core.update import Summed, number
from descend.distributed.ranks import Ranks, Share


class SummedParam(NamedTuple):
    """A parameter whose rule has sums, whether or not it has a gradient.

    Attributes:
        param: the parameter.
        share: which ranks hold its parts; None if it is not sharded.
        method: finds its method.
        rule: its rule.
    """

    param: Tensor
    share: Share | None
    method: MethodRef
    rule: Any


class Sums:
    """The sums of a step.

    Sums over all parameters, and those over parameters that ranks share, are reduced over the ranks. What they exchange
    depends on what all of them know: which parameters there are, not which have a gradient.

    Args:
        ranks: that share parameters.
        params: all that have rules with sums.
        summed: those that take the step, by rule.
    """

    def __init__(self, ranks: Ranks, params: Iterable[SummedParam], summed: Sequence[Summed]) -> None:
        self._ranks, self._summed = ranks, summed
        self._totals: dict[tuple[MethodRef, int], slice] = {}  # places of the totals of rules with as many sums
        self._places: dict[Tensor, slice] = {}  # of a parameter's sums among those exchanged over its mesh
        self._widths: dict[Any, int] = {}  # how many these are, by mesh
        self._width = 0  # of all totals
        for param, share, method, rule in params:
            count = signature(rule).sums
            if method().sums_over == "all":
                if (method, count) not in self._totals:
                    end = self._width + count + 1  # the last is the number of elements
                    self._totals[method, count], self._width = slice(self._width, end), end
            elif share is not None and share.mesh in ranks.meshes:
                first = self._widths.get(share.mesh, 0)
                self._places[param], self._widths[share.mesh] = slice(first, first + count), first + count

    def form(self, optimizer: MethodOptimizer) -> None:
        """Give rules the scalars that are formed of sums. Moves nothing; the host waits for each device once."""
        found = _on_host([each.sums(optimizer) for each in self._summed])
        totals = self._reduced(found) if self._width or self._widths else []
        for each, sums in zip(self._summed, found, strict=True):
            method, count = each.method(), len(signature(each.rule).formed)
            formed = np.empty((len(sums), count))
            for index, members in each.members:
                group = optimizer.param_groups[index]
                if method.sums_over == "all":
                    *total, numel = totals[self._totals[each.method, sums.shape[1]]]
                    values = [method.scalars_of_sums(group, total, round(numel))]
                else:
                    values = method.scalars_of_rows(group, sums[members], each.numels[members])
                formed[members] = _rows(each, values, count)
            each.take(formed)

    def _reduced(self, found: Sequence[np.ndarray]) -> list[float]:
        """The totals over all ranks. Rows of parameters that ranks share become the sums over these ranks, in place."""
        totals: dict[Share | None, np.ndarray] = {None: np.zeros(self._width)}
        beside = {mesh: np.zeros(width) for mesh, width in self._widths.items()}
        shared: list[tuple[np.ndarray, Any, slice]] = []
        for each, sums in zip(self._summed, found, strict=True):
            if each.method().sums_over == "all":
                total = totals.setdefault(each.share, np.zeros(self._width))
                total[self._totals[each.method, sums.shape[1]]] += [*sums.sum(axis=0), each.local_numel]
            elif each.share is not None and each.share.mesh in beside:
                for param, row in zip(each.params, sums, strict=True):
                    shared.append((row, each.share.mesh, self._places[param]))
                    beside[each.share.mesh][self._places[param]] = row / each.share.replicas
        sums_of_all, sums_by_mesh = self._ranks.reduce(
            {share: total.tolist() for share, total in totals.items()},
            {mesh: values.tolist() for mesh, values in beside.items()},
        )
        for row, mesh, place in shared:
            row[:] = sums_by_mesh[mesh][place]
        return sums_of_all


def _on_host(sums: Sequence[np.ndarray | Tensor]) -> list[np.ndarray]:
    """Arrays, out of the tensors that some are in: one wait for each device."""
    by_device: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
    for each in sums:
        if isinstance(each, Tensor):
            by_device[each.device].append(each)
    arrays: dict[int, np.ndarray] = {}
    for tensors in by_device.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).cpu().numpy().astype(np.float64)
        pieces = np.split(flat, np.cumsum([tensor.numel() for tensor in tensors])[:-1])
        for tensor, piece in zip(tensors, pieces, strict=True):
            arrays[id(tensor)] = piece.reshape(tensor.shape)
    return [arrays[id(each)] if isinstance(each, Tensor) else each for each in sums]


def _rows(summed: Summed, values: Any, count: int) -> Any:
    """What a method has formed, as an array with a row a parameter, or one for all."""
    if not isinstance(values, np.ndarray):
        if {*map(len, values)} != {count}:
            raise _wrong_count(summed, values)
        values = np.array([[float(number(value)) for value in row] for row in values])
    return values


def _wrong_count(summed: Summed, values: Sequence[Sequence[Any]]) -> TypeError:
    return TypeError(
        f"{type(summed.method()).__name__}: scalars_of_sums must return a tuple of "
        f"{', '.join(signature(summed.rule).formed)} for the rule {summed.rule.__name__}, got "
        f"{next(map(len, values))} numbers. Nothing has moved."
    )
