"""Gather all numbers of an optimizer in one walk over its state: each tensor is read once, and then let go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from descend.diagnostics.inspection.optimizers import SavedOptimizer
from descend.diagnostics.inspection.statistics import Histogram, Statistics, histogram_of, statistics, stuck, zero_rows
from descend.diagnostics.inspection.step_sizes import QUANTILES, below_eps, scaling_of
from descend.diagnostics.inspection.stored import Stored, number

# State that is zero where there has never been a gradient, and only there.
ZERO_WITHOUT_GRADIENT = ("exp_avg_sq", "square_avg", "sum", "momentum_buffer")


@dataclass
class Measures:
    """What was measured of one parameter.

    Attributes:
        statistics: by name of the state, and of the weight; None where the file has no values.
        step_sizes: effective step sizes at ``QUANTILES``, of the elements that have had a gradient.
        eps: of the denominator, bias corrections included.
        below_eps: elements whose root of v is smaller than eps, and all that are positive.
        stuck: by name of the state, elements that decay leaves as they are, those that are not zero, and the decay.
        zero_rows: rows that have never had a gradient, and all rows.
    """

    statistics: dict[str, Statistics | None] = field(default_factory=dict)
    step_sizes: list[float] | None = None
    eps: float = 0.0
    below_eps: tuple[int, int] = (0, 0)
    stuck: dict[str, tuple[int, int, float]] = field(default_factory=dict)
    zero_rows: tuple[int, int] = (0, 0)


@dataclass
class Examination:
    """An optimizer and what was measured.

    Attributes:
        saved: the optimizer.
        measures: of each of its parameters.
        group_step_sizes: effective step sizes of all elements of each group, at ``QUANTILES``.
    """

    saved: SavedOptimizer
    measures: list[Measures]
    group_step_sizes: list[list[float] | None]


def examine(saved: SavedOptimizer) -> Examination:
    """Measure everything."""
    sums: list[Histogram | None] = [None] * len(saved.groups)
    measures = []
    for param in saved.params:
        options = saved.groups[param.group] if param.group is not None else {}
        measured = Measures()
        for name, tensors in param.everything.items():
            tensors = [_kept(tensor) for tensor in tensors]
            measured.statistics[name] = statistics(tensors)
            values = tensors[0].read()
            numbers = measured.statistics[name]
            if len(tensors) > 1 or values is None or numbers is None:
                continue
            if name in ZERO_WITHOUT_GRADIENT and values.dim() == 2 and values.numel():
                rows = zero_rows(values) if numbers.zeros >= values.shape[1] else 0
                measured.zero_rows = max(measured.zero_rows, (rows, len(values)))
            gain = _gain(name, saved.method, options)
            if gain and values.dtype.is_floating_point and torch.finfo(values.dtype).eps > gain:
                measured.stuck[name] = (*stuck(values, gain), 1 - gain)
            scaling = scaling_of(saved.method, param, options)
            if scaling and scaling.second == name and values.dtype.is_floating_point:
                histogram = histogram_of(values, scaling)
                measured.eps, measured.below_eps = scaling.eps, below_eps(scaling, values)
                if histogram.total:
                    measured.step_sizes = histogram.quantiles(QUANTILES)
                    group = param.group or 0
                    total = sums[group] = sums[group] or Histogram()
                    total.merge(histogram)
        measures.append(measured)
    return Examination(saved, measures, [total.quantiles(QUANTILES) if total else None for total in sums])


def _kept(stored: Stored) -> Stored:
    """The same with its values read, so that they are read once."""
    values = stored.read()
    return stored if values is None else Stored(stored.shape, stored.dtype, lambda: values)


def _gain(name: str, method: str, options: dict[str, Any]) -> float | None:
    """The gain of a decaying average, 1 - beta; None if it is none, or the option is not a number in (0, 1)."""
    betas = options.get("betas")
    pair = betas if isinstance(betas, list) and len(betas) == 2 else (None, None)
    option = {
        "exp_avg": pair[1] if method == "Lion" else pair[0],
        "exp_avg_sq": pair[1],
        "exp_inf": pair[1],
        "momentum_buffer": options.get("momentum"),
        "square_avg": options.get("alpha", options.get("rho")),
        "acc_delta": options.get("rho"),
        "grad_avg": options.get("alpha"),
    }.get(name)
    beta = number(option)
    return 1 - beta if beta is not None and 0 < beta < 1 else None
