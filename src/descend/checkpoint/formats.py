"""Copies of a file's tensors in the formats that an optimizer asks for, and what is lost on the way."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from descend.core.caller import warn_caller
from descend.core.codecs import BLOCK
from descend.core.memory import PLAIN
from descend.state import lazy_memory


class Losses:
    """Counts what loading loses, so that one warning can say it."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, name: str, what: str) -> None:
        """Count the state called ``name`` of one parameter."""
        self._counts[name, what] += 1

    def warn(self, who: str) -> None:
        """Warn if there is anything to say."""
        if self._counts:
            lost = ", ".join(
                f"{name} of {count} parameter{'s' if count > 1 else ''} ({what})"
                for (name, what), count in self._counts.items()
            )
            warn_caller(f"{who}: loading loses digits: {lost}.")


def placed(value: Tensor, dtype: torch.dtype, param: Tensor, lazily: bool) -> Tensor:
    """A copy of ``value`` beside ``param``, and in its memory order if it has its shape, as kernels need it.

    Args:
        value: what to copy.
        dtype: of the copy.
        param: the parameter, or what this rank has of it.
        lazily: whether zeros shall lie in lazily committed memory, where that is possible.
    """
    if lazily and param.is_cpu and param.is_contiguous():
        return lazy_memory.copied(value, dtype)
    if value.shape != param.shape:
        return value.to(param.device, dtype, copy=True)
    return torch.empty_like(param, dtype=dtype).copy_(value)


def wider(value: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The wider of two dtypes: that of ``value``, and ``dtype``."""
    # torch does not promote float8; every other dtype is wider.
    return torch.promote_types(value.dtype, dtype) if value.itemsize > 1 else dtype


def is_lossy(saved: Tensor, kept: Tensor) -> bool:
    """Whether a number is another one now. NaN is none."""
    if saved.is_meta or kept.is_meta:
        return False
    saved = saved.to(kept.device)
    return not bool(((saved == kept) | saved.isnan()).all())


def looks_coded(numbers: Tensor) -> bool:
    """Whether floating-point numbers look like codes that something has cast: whole, up to 255, and of many kinds.

    torch.distributed.checkpoint casts what it reads to the dtype of what it reads into, and says nothing.
    """
    if type(numbers) not in PLAIN or numbers.is_meta or not numbers.is_floating_point() or numbers.itemsize == 1:
        return False
    for some in (numbers.reshape(-1)[:BLOCK], numbers):  # the first few tell of nearly all
        if not bool(((some == some.round()) & (some >= 0) & (some <= 255)).all()):
            return False
    return int(torch.bincount(numbers.to(torch.uint8).reshape(-1)).count_nonzero()) > 16


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype without the name of the package."""
    return str(dtype).removeprefix("torch.")
