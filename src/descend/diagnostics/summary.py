"""What an optimizer holds, as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from torch import Tensor

from descend.core.codecs import COMPENSATION, SCALE
from descend.core.optimizer import MethodOptimizer
from descend.reporting.memory import memory, tensors

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
        formats: bytes of the state by format, the largest first: ``"8bit"`` (codes and scales), names of dtypes, and
            ``"compensation"`` for what ``rounding="compensated"`` adds. Step counts and other scalars are left out.
    """

    group: int
    pattern: str
    parameters: int
    numbers: int
    state_bytes: int
    options: dict[str, Any]
    formats: dict[str, int]

    @property
    def bytes_per_number(self) -> float:
        """``state_bytes / numbers``: what this rank keeps, for each number of the whole parameters."""
        return self.state_bytes / self.numbers if self.numbers else 0.0


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
                state_bytes=memory(state),
                options={
                    name: group[name]
                    for name, default in {"method": None, **optimizer.defaults_of(optimizer.method_of(group))}.items()
                    if name in group and not _are_equal(group[name], default)
                },
                formats=_largest_first(_formats(state)),
            )
        )
    print(_table(rows), file=file)
    return tuple(rows)


def _table(rows: Sequence[Row]) -> str:
    heads = ("group", "pattern", "parameters", "numbers", "state", "per number", "formats", "options that differ")
    parameters, numbers, size = (sum(column) for column in zip(*(row[2:5] for row in rows), strict=True))
    formats = _largest_first(item for row in rows for item in row.formats.items())
    total = Row(0, "", parameters, numbers, size, {}, formats)
    lines = [heads, *map(_cells, rows), ("total", "", *_cells(total)[2:])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pads = (str.rjust, str.ljust, str.rjust, str.rjust, str.rjust, str.rjust, str.ljust, str.ljust)
    return "\n".join(
        "  ".join(pad(cell, width) for pad, cell, width in zip(pads, line, widths, strict=True)).rstrip()
        for line in lines
    )


def _formats(states: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, int]]:
    """How each tensor of the states is stored, and its bytes."""
    for state in states:
        coded = {name for name in state if name + SCALE in state}
        for name, value in state.items():
            for tensor in tensors(value):
                if tensor.dim():
                    is_coded = name in coded or name.removesuffix(SCALE) in coded
                    yield _format(name, tensor.dtype, is_coded), tensor.nbytes


def _format(name: str, dtype: torch.dtype, is_coded: bool) -> str:
    if is_coded:
        return "8bit"
    return COMPENSATION if name == COMPENSATION else str(dtype).removeprefix("torch.")


def _largest_first(sizes: Iterable[tuple[str, int]]) -> dict[str, int]:
    total = Counter[str]()
    for format, size in sizes:
        total[format] += size
    return dict(total.most_common())


def _are_equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False  # it may be the default itself, changed in place
    equal = a == b
    return bool(equal if isinstance(equal, bool) else np.all(equal))


def _cells(row: Row) -> tuple[str, ...]:
    options = ", ".join(f"{name}={value}" for name, value in row.options.items())
    each = f"{row.bytes_per_number:.2f} B" if row.state_bytes else "-"
    formats = ", ".join(row.formats) or "-"
    return (
        str(row.group),
        row.pattern or "-",
        f"{row.parameters:,}",
        f"{row.numbers:,}",
        _size(row.state_bytes),
        each,
        formats,
        options,
    )


def _size(size: int) -> str:
    value, unit = float(size), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {_UNITS[unit]}" if unit else f"{size} B"
