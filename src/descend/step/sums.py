"""Sums over tensors that are needed before a step, and the scalars that methods form of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descend.core.method import Method
from descend.core.optimizer import MethodOptimizer
from descend.core.signature import signature
from descend.core.update import Summed, number


def form_scalars(optimizer: MethodOptimizer, summed: Sequence[Summed]) -> None:
    """Give rules with sums the scalars that are formed of them. Moves nothing; the host waits for each device once.

    Args:
        optimizer: the optimizer.
        summed: what is to be summed, of updates that are ready to run otherwise.
    """
    found = _on_host([each.sums(optimizer) for each in summed])
    totals = _totals(summed, found)
    for each, sums in zip(summed, found, strict=True):
        method, count = each.method, len(signature(each.rule).formed)
        formed = np.empty((len(sums), count))
        for index, members in each.members:
            group = optimizer.param_groups[index]
            if method.sums_over == "all":
                values = [method.scalars_of_sums(group, *totals[method, sums.shape[1]])]
            else:
                rows = zip(sums[members].tolist(), each.numels[members].tolist(), strict=True)
                values = [method.scalars_of_sums(group, row, numel) for row, numel in rows]
            if {*map(len, values)} != {count}:
                raise _wrong_count(each, values)
            flat = [float(number(value)) for row in values for value in row]
            formed[members] = np.array(flat).reshape(-1, count)
        each.take(formed)


def _totals(summed: Sequence[Summed], found: Sequence[np.ndarray]) -> dict[tuple[Method, int], tuple[list[float], int]]:
    """Sums over all parameters of a method whose rules have as many sums, and the number of their elements."""
    sums: defaultdict[tuple[Method, int], Any] = defaultdict(float)
    numels: defaultdict[tuple[Method, int], int] = defaultdict(int)
    for each, rows in zip(summed, found, strict=True):
        if each.method.sums_over == "all":
            sums[each.method, rows.shape[1]] += rows.sum(axis=0)
            numels[each.method, rows.shape[1]] += int(each.numels.sum())
    return {key: (sums[key].tolist(), numels[key]) for key in sums}


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


def _wrong_count(summed: Summed, values: Sequence[Sequence[Any]]) -> TypeError:
    return TypeError(
        f"{type(summed.method).__name__}: scalars_of_sums must return a tuple of "
        f"{', '.join(signature(summed.rule).formed)} for the rule {summed.rule.__name__}, got "
        f"{next(map(len, values))} numbers. Nothing has moved."
    )
