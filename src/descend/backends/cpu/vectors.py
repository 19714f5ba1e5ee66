"""Compiled passes over long vectors and the rows of two matrices, for L-BFGS: see ``vectors_kernel``."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from descend.backends.cpu import library, threads

CHUNK = 4096  # elements; sums depend on it, and not on the threads
BLOCK = 2**17  # elements in the rows that are multiplied by each other at once: half of a second-level cache
SLABS = 64  # at most, into which long rows are divided for that
GROUP = 5  # as in ``row_loops``


class _Call:
    """The arguments of a loop, and its partial sums."""

    def __init__(self, numel: int) -> None:
        self._numel = numel
        self._arguments = array("q", bytes(8 * 20))
        self._address = self._arguments.buffer_info()[0]
        self._sums, self._counters = np.empty(0), np.empty(0, np.int64)

    def run(self, kernel: int, *arguments: int, sums: int = 0, chunk: int = CHUNK) -> np.ndarray:
        """Call a loop; return the sums of each chunk, shape (chunks, sums).

        Args:
            kernel: the loop.
            arguments: from the fifth one on.
            sums: how many numbers each chunk gives.
            chunk: elements of a chunk.
        """
        chunks = -(-self._numel // chunk)
        if len(self._sums) < chunks * sums:
            self._sums = np.empty(chunks * sums)
        parts = torch.get_num_threads()
        if len(self._counters) < 8 * parts:
            self._counters = np.empty(8 * parts, np.int64)
        self._counters[:] = 0
        common = self._numel, chunk, self._counters.ctypes.data, self._sums.ctypes.data
        self._arguments[: 4 + len(arguments)] = array("q", (*common, *arguments))
        self._arguments[17:] = array("q", (parts, threads.number_of_thread(), 0))
        threads.run(kernel, self._address, self._numel)
        return self._sums[: chunks * sums].reshape(chunks, sums)


class RowPasses:
    """The loops over the rows of matrices S and Y in float32, with vectors of one dtype.

    Args:
        steps, changes: S and Y, shape (rows, numel), contiguous.
        dtype: float32 or float64, of all vectors but diagonals, which are float32. Vectors are contiguous.
        every: distance of the entries that ``keep`` samples.
    """

    def __init__(self, steps: Tensor, changes: Tensor, dtype: torch.dtype, every: int) -> None:
        self.steps, self.changes, self.dtype = steps, changes, dtype
        n_rows, numel = steps.shape
        self._call = _Call(numel)
        self._stride = 4 * numel
        self._table = np.zeros((-(-n_rows // GROUP) * GROUP, 3))
        self._scratch = np.empty(0, np.float32)
        self._every, self._samples = every, np.empty((-(-numel // every), 3))

    def keep(
        self,
        slot: int,
        pair: Sequence[Tensor],
        before: Sequence[Tensor],
        factors: tuple[float, float],
        diagonal: Tensor,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Store s and y, multiplied by factors, in a row; return y'D y, s'D^-1 s and s'y, and samples of D, s and y.

        Args:
            slot: the row.
            pair: s and y.
            before: what is subtracted from them first; empty for nothing.
            factors: of s and y.
            diagonal: D.
        """
        kernel = library.vectors("keep", self.dtype, bool(before))
        vectors = [tensor.data_ptr() for tensor in (*pair, *before)]
        vectors += [0] * (4 - len(vectors))
        samples = self._samples.ctypes.data, self._every
        numbers = *self._row(slot), diagonal.data_ptr(), *map(_bits, factors), *samples
        return self._call.run(kernel, *vectors, *numbers, sums=3).sum(0), self._samples.T.copy()

    def learn(
        self, slot: int, diagonal: Tensor, factors: tuple[float, float, float], limits: tuple[float, float]
    ) -> None:
        """Set a diagonal D to r D / (1 + p D y^2 - q s^2 / D), within limits; the factors are p, q and r."""
        numbers = map(_bits, (*factors, *limits))
        self._call.run(library.vectors("learn"), *self._row(slot), diagonal.data_ptr(), *numbers)

    def products(self, filled: int, diagonal: Tensor, grad: Tensor, factor: float, slot: int | None) -> np.ndarray:
        """S g and Y D g of the filled rows for g = factor * grad; with a slot also S y and Y D y of the y there."""
        width, y = (2, 0) if slot is None else (4, self.changes[slot].data_ptr())
        kernel = library.vectors("products", self.dtype, slot is not None)
        vectors = diagonal.data_ptr(), grad.data_ptr(), _bits(factor), y, self._scratch_of(3 * CHUNK)
        sums = self._call.run(kernel, *self._rows, self._stride, filled, *vectors, sums=width * filled)
        products: np.ndarray = sums.sum(0).reshape(width, filled)
        return products

    def gram(self, filled: int, diagonal: Tensor) -> np.ndarray:
        """Y D Y' of the filled rows."""
        block = max(64, BLOCK // filled // 64 * 64)
        slab = max(block, -(-self.changes.shape[1] // SLABS))
        rows = self.changes.data_ptr(), self._stride, filled, diagonal.data_ptr()
        scratch = self._scratch_of(2 * block + 4 * filled)
        sums = self._call.run(library.vectors("gram"), block, *rows, scratch, sums=filled**2, chunk=slab)
        lower = np.tril(sums.sum(0).reshape(filled, filled))
        whole: np.ndarray = lower + np.tril(lower, -1).T
        return whole

    def direction(
        self,
        filled: int,
        diagonal: Tensor,
        stretch: float,
        grad: Tensor,
        factors: tuple[float, float],
        weights: tuple[np.ndarray, np.ndarray],
        result: Tensor,
    ) -> None:
        """Multiply D by ``stretch``; then result = a (D (b grad + Y'u) + S'p).

        Args:
            filled: how many rows there are.
            diagonal: D.
            stretch: a factor.
            grad: a vector.
            factors: b and a.
            weights: u and p.
            result: where to.
        """
        self._table[:] = 0.0
        self._table[:filled] = np.stack([np.arange(filled), *weights], axis=1)
        groups = -(-filled // GROUP) * GROUP
        vectors = diagonal.data_ptr(), grad.data_ptr(), *map(_bits, factors), self._table.ctypes.data
        target = self._scratch_of(CHUNK), result.data_ptr(), _bits(stretch)
        self._call.run(library.vectors("direction", self.dtype), *self._rows, self._stride, groups, *vectors, *target)

    @property
    def _rows(self) -> tuple[int, int]:
        return self.steps.data_ptr(), self.changes.data_ptr()

    def _row(self, slot: int) -> tuple[int, int]:
        return self.steps[slot].data_ptr(), self.changes[slot].data_ptr()

    def _scratch_of(self, floats: int) -> int:
        """The address of so much memory for each thread."""
        size = floats * torch.get_num_threads()
        if len(self._scratch) < size:
            self._scratch = np.empty(size, np.float32)
        return self._scratch.ctypes.data


def look_along(grad: Tensor, direction: Tensor, before: Tensor) -> tuple[float, float, float]:
    """Inner products of two gradients with a direction; largest absolute entry of the first, NaN if one is."""
    kernel = library.vectors("look", grad.dtype)
    sums = _Call(len(grad)).run(kernel, grad.data_ptr(), direction.data_ptr(), before.data_ptr(), sums=3)
    slope, slope_before = sums[:, :2].sum(0).tolist()
    bits = sums[:, 2:].view(np.int64).max()
    largest = bits.view(np.float64) if grad.dtype == torch.float64 else bits.astype(np.int32).view(np.float32)
    return slope, slope_before, float(largest)


def _bits(number: float) -> int:
    """A float64 as the integer with the same bits."""
    (bits,) = struct.unpack("q", struct.pack("d", number))
    return int(bits)
