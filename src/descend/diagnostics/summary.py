"""What an optimizer holds, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

import numpy as np
from torch import Tensor

from descend.core.optimizer import MethodOptimizer
from descend.distributed.dtensors import local_of

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class Row(NamedTuple):
    """One parameter group.

    Attributes:
        group: index of the group.
        pattern: the pattern that matched its parameters; empty without ``groups`` and for unmatched parameters.
        parameters: number of tensors.
        numbers: total number of elements in them.
        state_bytes: size of the state that exists now, on this rank; lazily committed memory counts in full.
        options: options that now differ from the optimizer's defaults, and all options that are tensors.
    """

    group: int
    pattern: str
    parameters: int
    numbers: int
    state_bytes: int
    options: dict[str, Any]


def summarize(optimizer: MethodOptimizer, patterns: Mapping[str, str], file: TextIO | None) -> tuple[Row, ...]:
    """Print the table and return its rows, see ``FirstOrder.summary``.

    Args:
        optimizer: the optimizer.
        patterns: by parameter name, the pattern that matched it.
        file: where to print; None for standard output.
    """
    rows = []
    for index, group in enumerate(optimizer.param_groups):
        matched = dict.fromkeys(patterns.get(name, "") for name in group.get("param_names", ()))
        # ``dict.get`` reads the state without marking it as exposed to the user.
        state = [dict.get(optimizer.state, param) or {} for param in group["params"]]
        rows.append(
            Row(
                group=index,
                pattern=", ".join(filter(None, matched)),
                parameters=len(group["params"]),
                numbers=sum(param.numel() for param in group["params"]),
                state_bytes=sum(local_of(tensor).nbytes for content in state for tensor in _tensors(content)),
                options={
                    name: group[name]
                    for name, default in {"method": None, **optimizer.defaults_of(optimizer.method_of(group))}.items()
                    if name in group and not _are_equal(group[name], default)
                },
            )
        )
    print(_table(rows), file=file)
    return tuple(rows)


def _table(rows: Sequence[Row]) -> str:
    heads = ("group", "pattern", "parameters", "numbers", "state", "options that differ")
    sums = [sum(column) for column in zip(*(row[2:5] for row in rows), strict=True)]
    lines = [heads, *map(_cells, rows), ("total", "", *_sizes(sums), "")]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pads = (str.rjust, str.ljust, str.rjust, str.rjust, str.rjust, str.ljust)
    return "\n".join(
        "  ".join(pad(cell, width) for pad, cell, width in zip(pads, line, widths, strict=True)).rstrip()
        for line in lines
    )


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(entry)


def _are_equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False  # it may be the default itself, changed in place
    equal = a == b
    return bool(equal if isinstance(equal, bool) else np.all(equal))


def _cells(row: Row) -> tuple[str, ...]:
    options = ", ".join(f"{name}={value}" for name, value in row.options.items())
    return (str(row.group), row.pattern or "-", *_sizes(row[2:5]), options)


def _sizes(values: Iterable[int]) -> tuple[str, str, str]:
    parameters, numbers, size = values
    value, unit = float(size), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{parameters:,}", f"{numbers:,}", f"{value:.1f} {_UNITS[unit]}" if unit else f"{size} B"
