"""What an optimizer holds, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from descend.first_order.optimizer import FirstOrder

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class Row(NamedTuple):
    """One parameter group.

    Attributes:
        group: index of the group.
        pattern: the pattern that matched its parameters; empty without ``groups`` and for unmatched parameters.
        parameters: number of tensors.
        numbers: total number of elements in them.
        state_bytes: size of the state that exists now; lazily committed memory counts in full.
        options: options that now differ from the optimizer's defaults, and all options that are tensors.
    """

    group: int
    pattern: str
    parameters: int
    numbers: int
    state_bytes: int
    options: dict[str, Any]


def summarize(self: FirstOrder, file: TextIO | None = None) -> tuple[Row, ...]:
    """Print a table of the parameter groups as they are now.

    Args:
        file: where to print. Default: standard output.
    Returns:
        The rows of the table.
    Example:
        >>> import torch
        >>> from descend import AdamW
        >>> rows = AdamW(torch.nn.Linear(2, 3), groups=[("bias", dict(weight_decay=0))]).summary()
        group  pattern  parameters  numbers  state  options that differ
            0  -                 1        6    0 B
            1  bias              1        3    0 B  weight_decay=0
        total                    2        9    0 B
    """
    rows = []
    for index, group in enumerate(self.param_groups):
        found = dict.fromkeys(self._patterns.get(name, "") for name in group.get("param_names", ()))
        # ``dict.get`` reads the state without marking it as exposed to the user.
        state = [dict.get(self.state, param) or {} for param in group["params"]]
        rows.append(
            Row(
                group=index,
                pattern=", ".join(filter(None, found)),
                parameters=len(group["params"]),
                numbers=sum(param.numel() for param in group["params"]),
                state_bytes=sum(tensor.nbytes for content in state for tensor in _tensors(content)),
                options={
                    name: group[name]
                    for name, default in self.defaults.items()
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
    align = (str.rjust, str.ljust, str.rjust, str.rjust, str.rjust, str.ljust)
    return "\n".join(
        "  ".join(place(cell, width) for place, cell, width in zip(align, line, widths, strict=True)).rstrip()
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
