"""The space of flat vectors: which of their entries this process holds, and sums over all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SAMPLE = 1000  # entries, about, from which a median is estimated

Array = Any  # a tensor or a NumPy array


class Space:
    """Vectors of which this process holds every entry.

    Where several ranks hold one part each, the methods below reduce over the ranks: in one collective, with the same
    bits on all of them. Here there is nothing to reduce, and they cost nothing.

    Args:
        numel: entries of a whole vector.
    """

    is_shared = False  # whether other ranks hold entries
    n_ranks = 1

    def __init__(self, numel: int) -> None:
        self.numel = numel

    def total(self, *sums: Array) -> Sequence[Any]:
        """Sums over all entries, from sums over those held here; numbers, vectors and matrices of them."""
        return sums

    def floats(self, device: torch.device, *sums: Tensor | float) -> list[float]:
        """``total`` of scalars as Python floats, in one transfer from the device."""
        return to_floats(device, *sums)

    def evaluation(
        self,
        device: torch.device,
        value: Tensor | float,
        low: Tensor | float,
        high: Tensor | float,
        *sums: Array | float,
    ) -> list[Any]:
        """Value of a function, least and largest entry of a vector, and totals; numbers as Python floats.

        The value is the mean over the ranks: each may have data of its own.
        """
        return to_floats(device, value, low, high, *sums)

    def largest(self, number: float) -> float:
        """The largest of a number over the ranks; NaN if one is."""
        return number

    def norm(self, vector: Tensor) -> float:
        """The 2-norm of a vector whose entries are neither large nor small."""
        return float(torch.linalg.vector_norm(vector))

    def length(self, vector: Tensor) -> float:
        """The 2-norm of a vector, without overflow or underflow."""
        return length(vector)

    def random(self, like: Tensor) -> Tensor:
        """Normal random numbers, always the same."""
        return _random(like)

    def samples(self, *vectors: Array) -> Sequence[Any]:
        """About 1,000 entries of each vector, always the same; where ranks share it, to be completed by ``total``."""
        return [vector[:: distance_of_samples(len(vector))] for vector in vectors]


def distance_of_samples(numel: int) -> int:
    """The distance of about 1,000 entries of a vector."""
    return 1 + numel // SAMPLE


def _random(like: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def to_floats(device: torch.device, *scalars: Tensor | float) -> list[float]:
    """Scalars as Python floats, in one transfer from the device."""
    if device.type == "cpu":
        return [float(scalar) for scalar in scalars]
    on_device = [torch.as_tensor(scalar, dtype=torch.float64, device=device) for scalar in scalars]
    floats: list[float] = torch.stack(on_device).tolist()
    return floats


def length(vector: Tensor) -> float:
    """The 2-norm of a tensor, without overflow or underflow."""
    largest = float(vector.abs().amax()) if vector.numel() else 0.0
    return largest * float(torch.linalg.vector_norm(vector / largest)) if 0 < largest < math.inf else largest
