"""What a row of an address table holds: addresses of a tensor's parts, then what their formats need to know of it."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from descend.core.codecs import Codec, Formats, needs_noise, stored_dtypes


class Columns(NamedTuple):
    """Columns of an address table.

    Attributes:
        formats: of the parameter, the gradient and the state tensors of a rule, which come first.
        dtypes: of those and of what their formats add, the compensation and the scales: columns with an address.
        scales: for each column, that of its scales, or -1.
        width: the column with the row width, if there are codes; else -1.
        stream: the column with the stream's number, before that with its place, if there is noise; else -1.
        size: how many columns there are.
    """

    formats: Formats
    dtypes: tuple[torch.dtype, ...]
    scales: tuple[int, ...]
    width: int
    stream: int
    size: int

    @property
    def elements(self) -> tuple[torch.dtype, ...]:
        """Dtypes of the columns with an element for each number, the first ones."""
        return self.dtypes[: len(self.dtypes) - len(self.coded)]

    @property
    def coded(self) -> tuple[int, ...]:
        """The columns with codes."""
        return tuple(column for column, scale in enumerate(self.scales) if scale >= 0)


@cache
def columns_of(formats: Formats) -> Columns:
    """The columns of tensors in these formats; without codes and rounding, there are no others than theirs."""
    dtypes, is_coded = stored_dtypes(formats), [isinstance(format, Codec) for format in formats]
    first_scale, count = len(dtypes) - sum(is_coded), len(dtypes)
    scales = tuple(first_scale + sum(is_coded[:i]) if coded else -1 for i, coded in enumerate(is_coded))
    width = stream = -1
    if any(is_coded):
        width, count = count, count + 1
    if needs_noise(formats):
        stream, count = count, count + 2
    return Columns(formats, dtypes, scales, width, stream, count)
