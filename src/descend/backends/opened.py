"""A parameter and its state as a rule sees them, and what has become of them stored again: with torch's operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from descend.core import codecs
from descend.core.codecs import Codec, Format, Formats, Rounded
from descend.core.noise import Stream, sixteen_bits


class Noise(NamedTuple):
    """Where the noise of one step of one parameter comes from.

    Attributes:
        stream: of the parameter.
        key: of the step, see ``core.noise.step_key``.
        places: of the first elements of rows, if only some rows are stepped.
    """

    stream: Stream
    key: int
    places: Tensor | None = None

    def of_rows(self, rows: Tensor, width: int) -> Noise:
        """That of some rows, given by their numbers, of ``width`` elements."""
        return self._replace(places=self.stream.place + rows * width)

    def bits(self, shape: torch.Size, column: int, device: torch.device) -> Tensor:
        """16 bits for each element of a tensor of this shape."""
        if self.places is None:
            places = torch.arange(self.stream.place, self.stream.place + shape.numel(), device=device)
        else:
            width = shape.numel() // max(len(self.places), 1)
            places = self.places[:, None] + torch.arange(width, device=device)
        return sixteen_bits(places.reshape(shape), self.key, self.stream.number, column)


class Opened:
    """Numbers of one parameter and its state, taken out of their formats.

    Args:
        formats: of the parameter, its gradient and its state.
        param: the parameter.
        stored: the tensors that ``codecs.stored_names`` lists.
    Attributes:
        param, state: what a rule sees: new tensors, but for what is stored as a dtype. They may be written.
    """

    def __init__(self, formats: Formats, param: Tensor, stored: Sequence[Tensor]) -> None:
        param_format, _, *state_formats = formats
        self._formats: list[Format] = [param_format, *state_formats]
        self._stored, added = [param, *stored[: len(state_formats)]], iter(stored[len(state_formats) :])
        self._added = [next(added) if _adds(format) else None for format in self._formats]
        self.param, *self.state = map(_opened, self._formats, self._stored, self._added)

    def close(self, noise: Noise | None) -> None:
        """Store the numbers in their formats."""
        for column, format in enumerate(self._formats):
            _store(format, self._stored[column], self._added[column], (self.param, *self.state)[column], noise, column)


def _adds(format: Format) -> bool:
    """Whether a format has a second tensor."""
    return isinstance(format, Codec) or format == Rounded("compensated")


def _opened(format: Format, stored: Tensor, added: Tensor | None) -> Tensor:
    if isinstance(format, torch.dtype):
        return stored
    if added is None:
        return stored.float()
    return codecs.decode(stored, added, format) if isinstance(format, Codec) else codecs.joined(stored, added)


def _store(
    format: Format, stored: Tensor, added: Tensor | None, numbers: Tensor, noise: Noise | None, column: int
) -> None:
    if isinstance(format, torch.dtype):
        return
    is_random = format.stochastic if isinstance(format, Codec) else added is None
    bits = None
    if is_random:
        assert noise is not None
        bits = noise.bits(numbers.shape, column, numbers.device)
    if added is None:
        assert bits is not None
        stored.copy_(codecs.rounded_stochastically(numbers, bits))
        return
    values, more = codecs.encode(numbers, format, bits) if isinstance(format, Codec) else codecs.split(numbers)
    stored.copy_(values)
    added.copy_(more)
