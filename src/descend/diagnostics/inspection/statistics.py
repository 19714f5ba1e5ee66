"""Numbers that describe a state tensor, gathered in pieces in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from descend.diagnostics.inspection.stored import Stored, pieces

# A histogram over the leading bits of float64: 8 of the mantissa, so that a bin is 0.4 % wide.
_SHIFT = 44


@dataclass(frozen=True)
class Statistics:
    """What a tensor, or all tensors of a history, hold.

    Attributes:
        numel: number of elements; complex ones count twice.
        norm: 2-norm of the finite elements.
        smallest, largest: of the finite elements; None if there are none.
        zeros, nans, infs, negatives, subnormals: how many elements are so.
    """

    numel: int
    norm: float
    smallest: float | None
    largest: float | None
    zeros: int
    nans: int
    infs: int
    negatives: int
    subnormals: int


def statistics(tensors: Sequence[Stored]) -> Statistics | None:
    """Gather them; None if the file has no values."""
    counts = np.zeros(6, dtype=np.int64)
    norm, smallest, largest = 0.0, math.inf, -math.inf
    for stored in tensors:
        tensor = stored.read()
        if tensor is None:
            return None
        tiny = torch.finfo(stored.dtype).tiny if stored.dtype.is_floating_point or stored.dtype.is_complex else 0.0
        for piece in pieces(tensor):
            values = piece.to(torch.float64)
            finite = torch.isfinite(values)
            nans = int(torch.isnan(values).sum())
            bad = values.numel() - int(finite.sum())
            numel = values.numel()
            if bad:
                values = values[finite]
            zeros, negatives, subnormals = 0, 0, 0
            if values.numel():
                low, high = values.aminmax()
                smallest, largest = min(smallest, float(low)), max(largest, float(high))
                zeros, negatives = int((values == 0).sum()), int((values < 0).sum())
                subnormals = int((values.abs() < tiny).sum()) - zeros if tiny else 0
                # Divided by the largest element: squares of float64 can overflow.
                scale = max(abs(float(low)), abs(float(high)))
                if scale:
                    norm = math.hypot(norm, scale * float((values / scale).square_().sum().sqrt()))
            counts += (numel, zeros, nans, bad - nans, negatives, subnormals)
    numel, zeros, nans, infs, negatives, subnormals = map(int, counts)
    is_empty = smallest > largest
    return Statistics(
        numel,
        norm,
        None if is_empty else smallest,
        None if is_empty else largest,
        zeros,
        nans,
        infs,
        negatives,
        subnormals,
    )


def zero_rows(tensor: Tensor) -> int:
    """How many rows of a matrix are all zero."""
    rows = max(1, (1 << 20) // max(1, tensor.shape[1]))
    return sum(int((tensor[start : start + rows] == 0).all(dim=1).sum()) for start in range(0, len(tensor), rows))


def stuck(tensor: Tensor, gain: float) -> tuple[int, int]:
    """How many elements a decay by ``1 - gain`` leaves as they are, and how many are finite and not zero."""
    still = alive = 0
    for piece in pieces(tensor):
        values = piece[torch.isfinite(piece) & (piece != 0)]
        decayed = (values.to(torch.float64) * (1 - gain)).to(values.dtype)
        still, alive = still + int((decayed == values).sum()), alive + values.numel()
    return still, alive


class Histogram:
    """Counts of positive numbers over all magnitudes, from which quantiles are read to 0.2 %."""

    def __init__(self) -> None:
        self._first = 0  # the bin of the first of the counts
        self._counts = np.zeros(0, dtype=np.int64)

    def add(self, values: Tensor) -> None:
        """Count the elements of ``values``: float64, positive, finite."""
        if values.numel():
            bins = values.numpy().view(np.int64) >> _SHIFT
            first = int(bins.min())
            self._add(first, np.bincount(bins - first))

    def merge(self, other: Histogram) -> None:
        """Count what ``other`` has counted."""
        self._add(other._first, other._counts)

    def _add(self, first: int, counts: NDArray[np.int64]) -> None:
        if not self._counts.size:
            self._first, self._counts = first, counts.copy()
            return
        start = min(self._first, first)
        both = np.zeros(max(self._first + len(self._counts), first + len(counts)) - start, dtype=np.int64)
        both[self._first - start :][: len(self._counts)] += self._counts
        both[first - start :][: len(counts)] += counts
        self._first, self._counts = start, both

    @property
    def total(self) -> int:
        return int(self._counts.sum())

    def quantiles(self, at: Sequence[float]) -> list[float]:
        """The middle of the bin that each quantile lies in."""
        last = np.cumsum(self._counts)
        ranks = [min(last[-1], max(1, math.ceil(q * last[-1]))) for q in at]
        bins = self._first + np.searchsorted(last, ranks)
        edges = np.stack([bins, bins + 1]).astype(np.int64) << _SHIFT
        return [float(value) for value in edges.view(np.float64).mean(axis=0)]


def histogram_of(tensor: Tensor, size: Callable[[Tensor], Tensor]) -> Histogram:
    """The histogram of ``size`` of all positive finite elements."""
    histogram = Histogram()
    for piece in pieces(tensor):
        values = piece.to(torch.float64)
        sizes = size(values[(values > 0) & torch.isfinite(values)])
        histogram.add(sizes[(sizes > 0) & torch.isfinite(sizes)])
    return histogram
