"""Axes of plotly's charts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from descend.reporting.text import number


def log_axis(title: str, values: Iterable[float | None], show: Callable[[float], str] = number) -> dict[str, Any]:
    """Return a logarithmic axis whose ticks are whole numbers with their units: 0.02, 0.05, 0.1.

    Args:
        title: of the axis.
        values: what is drawn; only positive, finite numbers count.
        show: writes a tick. Default: ``text.number``.

    Example:
        >>> axis = log_axis("loss", [0.013, 0.4])
        >>> axis["ticktext"], [round(end, 2) for end in axis["range"]]
        (['0.02', '0.05', '0.1', '0.2'], [-1.96, -0.32])
    """
    positive = [value for value in values if value is not None and 0 < value < math.inf]
    low, high = math.log10(min(positive, default=0.1)), math.log10(max(positive, default=1.0))
    margin = max(0.05 * (high - low), 0.02)
    low, high = low - margin, high + margin
    ticks = [value for value in _ticks(low, high) if low <= math.log10(value) <= high]
    return {
        "type": "log",
        "range": [low, high],
        "tickvals": ticks,
        "ticktext": [show(tick) for tick in ticks],
        "title": {"text": title},
    }


def _ticks(low: float, high: float) -> list[float]:
    """Return about four to ten round numbers between two powers of ten, and some outside."""
    if high - low < 0.8:
        start, end = 10**low, 10**high
        unit = 10.0 ** math.floor(math.log10((end - start) / 4))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor * 7 >= end - start)
        return [step * i for i in range(math.ceil(start / step), math.floor(end / step) + 1)]
    powers = range(math.floor(low), math.ceil(high) + 1)
    if high - low > 4:
        return [10.0**power for power in powers if power % math.ceil((high - low) / 8) == 0]
    digits = (1,) if high - low > 2.5 else (1, 2, 5)
    return [digit * 10.0**power for power in powers for digit in digits]
