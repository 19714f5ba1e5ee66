"""Tensors of a file, read when their values are asked for, and looked at in pieces of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from descend.distributed.dtensors import local_of
from descend.reporting.errors import UsageError

PIECE = 1 << 20  # elements looked at together: 8 MiB in float64
_SUSPICIOUS = 1 << 24


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        shape, dtype: as the file states them.
        load: reads the values; None if the file has none (a meta tensor).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor] | None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def format(self) -> str:
        """How its numbers are stored, in a word."""
        return str(self.dtype).removeprefix("torch.")

    def read(self) -> Tensor | None:
        """The values as a dense tensor of real or complex numbers, None if there are none."""
        if self.load is None:
            return None
        tensor = self.load()
        if tensor.layout != torch.strided:
            tensor = tensor.to_dense()
        if tensor.is_quantized:
            tensor = tensor.dequantize()
        return tensor


def stored(tensor: Tensor) -> Stored:
    """Wrap a tensor that ``torch.load`` has made.

    Raises:
        UsageError: if it claims many more elements than its memory holds.
    """
    tensor = local_of(tensor).detach()
    shape = tuple(tensor.shape)
    if tensor.is_meta:
        return Stored(shape, tensor.dtype, None)
    if tensor.layout == torch.strided:
        memory = tensor.untyped_storage().nbytes()
        is_expanded = tensor.numel() * tensor.dtype.itemsize > memory
    else:
        memory = sum(part.untyped_storage().nbytes() for part in _parts(tensor))
        is_expanded = tensor.numel() > memory
    if is_expanded and tensor.numel() > _SUSPICIOUS:
        raise UsageError(f"a tensor claims {tensor.numel():,} elements, and the file has {memory:,} bytes for them.")
    return Stored(shape, tensor.dtype, lambda: tensor)


def _parts(tensor: Tensor) -> list[Tensor]:
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    return [tensor.values()]


def wrapped(value: Any) -> Any:
    """The same structure with a ``Stored`` for every tensor and lists for tuples; what is shared stays shared."""
    return _wrapped(value, {})


def _wrapped(value: Any, seen: dict[int, Any]) -> Any:
    if isinstance(value, Tensor):
        return stored(value)
    if not isinstance(value, Mapping | list | tuple):
        return value
    if id(value) not in seen:
        if isinstance(value, Mapping):
            entries: dict[Any, Any] = {}
            seen[id(value)] = entries
            entries.update((key, _wrapped(entry, seen)) for key, entry in value.items())
        else:
            items: list[Any] = []
            seen[id(value)] = items
            items.extend(_wrapped(entry, seen) for entry in value)
    return seen[id(value)]


def number(value: Any) -> float | None:
    """A number, or the one of a stored tensor with one element; None if ``value`` is neither."""
    if isinstance(value, Stored):
        tensor = value.read() if value.numel == 1 and not value.dtype.is_complex else None
        return None if tensor is None else float(tensor.item())
    if isinstance(value, Tensor):
        return number(stored(value))
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return None
    return None


def shown(value: Any) -> str:
    """A value in few characters, whatever a file makes of it."""
    single = number(value)
    if single is not None:
        return f"{single:.6g}"
    if isinstance(value, bool | None):
        return str(value)
    if isinstance(value, str):
        return repr(value[:40])
    if isinstance(value, list):
        inner = ", ".join(shown(entry) if not isinstance(entry, list | dict) else "..." for entry in value[:6])
        return f"[{inner}{', ...' if len(value) > 6 else ''}]"
    if isinstance(value, Stored):
        return f"a tensor {list(value.shape)}"
    return f"a {type(value).__name__}"


def exact(value: float) -> str:
    """A number with all digits of a step count.

    Example:
        >>> exact(1234567.0), exact(0.1)
        ('1,234,567', '0.1')
    """
    return f"{value:,.10g}"


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The elements in order, at most ``PIECE`` at a time and one-dimensional; complex ones as pairs of real ones."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.numel() <= PIECE:
        yield tensor.reshape(-1)
        return
    rows = max(1, PIECE * tensor.shape[0] // tensor.numel())
    for start in range(0, tensor.shape[0], rows):
        part = tensor[start : start + rows]
        yield from pieces(part[0] if rows == 1 and tensor.dim() > 1 else part)
