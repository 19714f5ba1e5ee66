"""Compiled passes over long vectors and the rows of two matrices, for L-BFGS: see ``vectors_kernel``."""

from __future__ import annotations

import struct
import threading
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

# Layouts of the loops' arguments: of those that all have, from 0 and from 17 on, and of their own, from 4 on.
_COMMON, _THREADS = struct.Struct("4q"), struct.Struct("3q")
_KEEP, _LEARN, _PRODUCTS, _GRAM = map(struct.Struct, ("7q2d2q", "3q5d", "6qd2q", "6q"))
_DIRECTION, _LOOK = struct.Struct("6q2d3qd"), struct.Struct("3q")


class _Call:
    """The arguments of a loop, and its partial sums."""

    def __init__(self, numel: int) -> None:
        self.numel = numel
        self._arguments = array("q", bytes(8 * 20))
        self._address = self._arguments.buffer_info()[0]
        self._sums, self._counters = np.empty(0), np.empty(0, np.int64)
        self._sums_address = self._counters_address = 0

    def run(
        self, kernel: int, layout: struct.Struct, *arguments: float, sums: int = 0, chunk: int = CHUNK
    ) -> np.ndarray:
        """Call a loop; return the sums of each chunk, shape (chunks, sums).

        Args:
            kernel: the loop.
            layout: of its own arguments.
            arguments: its own.
            sums: how many numbers each chunk gives.
            chunk: elements of a chunk.
        """
        chunks = -(-self.numel // chunk)
        if len(self._sums) < chunks * sums:
            self._sums = np.empty(chunks * sums)
            self._sums_address = self._sums.ctypes.data
        parts = torch.get_num_threads()
        if len(self._counters) < 8 * parts:
            self._counters = np.empty(8 * parts, np.int64)
            self._counters_address = self._counters.ctypes.data
        self._counters.fill(0)
        _COMMON.pack_into(self._arguments, 0, self.numel, chunk, self._counters_address, self._sums_address)
        layout.pack_into(self._arguments, 32, *arguments)
        _THREADS.pack_into(self._arguments, 136, parts, threads.number_of_thread(), 0)
        threads.run(kernel, self._address, self.numel)
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
        self._rows, self._stride = (steps.data_ptr(), changes.data_ptr()), 4 * numel
        self._numbers, self._table = np.arange(n_rows), np.zeros((-(-n_rows // GROUP) * GROUP, 3))
        self._scratch, self._scratch_address = np.empty(0, np.float32), 0
        self._every, self._samples = every, np.empty((-(-numel // every), 3))
        self._table_address, self._samples_address = self._table.ctypes.data, self._samples.ctypes.data

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
        if not before:
            vectors += [0, 0]
        rows = *self._row(slot), diagonal.data_ptr()
        sums = self._call.run(kernel, _KEEP, *vectors, *rows, *factors, self._samples_address, self._every, sums=3)
        return sums.sum(0), self._samples.T.copy()

    def learn(
        self, slot: int, diagonal: Tensor, factors: tuple[float, float, float], limits: tuple[float, float]
    ) -> None:
        """Set a diagonal D to r D / (1 + p D y^2 - q s^2 / D), within limits; the factors are p, q and r."""
        vectors = *self._row(slot), diagonal.data_ptr()
        self._call.run(library.vectors("learn"), _LEARN, *vectors, *factors, *limits)

    def products(self, filled: int, diagonal: Tensor, grad: Tensor, factor: float, slot: int | None) -> np.ndarray:
        """S g and Y D g of the filled rows for g = factor * grad; with a slot also S y and Y D y of the y there."""
        width, y = (2, 0) if slot is None else (4, self._row(slot)[1])
        kernel = library.vectors("products", self.dtype, slot is not None)
        vectors = diagonal.data_ptr(), grad.data_ptr(), factor, y, self._scratch_of(3 * CHUNK)
        sums = self._call.run(kernel, _PRODUCTS, *self._rows, self._stride, filled, *vectors, sums=width * filled)
        products: np.ndarray = sums.sum(0).reshape(width, filled)
        return products

    def gram(self, filled: int, diagonal: Tensor) -> np.ndarray:
        """Y D Y' of the filled rows."""
        block = max(64, BLOCK // filled // 64 * 64)
        slab = max(block, -(-self.changes.shape[1] // SLABS))
        arguments = (
            block,
            self._rows[1],
            self._stride,
            filled,
            diagonal.data_ptr(),
            self._scratch_of(2 * block + 4 * filled),
        )
        sums = self._call.run(library.vectors("gram"), _GRAM, *arguments, sums=filled**2, chunk=slab)
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
        """Set result to a (c D (b grad + Y'u) + S'p).

        Args:
            filled: how many rows there are.
            diagonal: D.
            stretch: c.
            grad: a vector.
            factors: b and a.
            weights: u and p.
            result: where to.
        """
        self._table[:filled, 0] = self._numbers[:filled]
        self._table[:filled, 1], self._table[:filled, 2] = weights
        self._table[filled:] = 0.0
        groups = -(-filled // GROUP) * GROUP
        vectors = diagonal.data_ptr(), grad.data_ptr(), *factors, self._table_address
        target = self._scratch_of(CHUNK), result.data_ptr(), stretch
        kernel = library.vectors("direction", self.dtype)
        self._call.run(kernel, _DIRECTION, *self._rows, self._stride, groups, *vectors, *target)

    def _row(self, slot: int) -> tuple[int, int]:
        return self._rows[0] + slot * self._stride, self._rows[1] + slot * self._stride

    def _scratch_of(self, floats: int) -> int:
        """The address of so much memory for each thread."""
        size = floats * torch.get_num_threads()
        if len(self._scratch) < size:
            self._scratch = np.empty(size, np.float32)
            self._scratch_address = self._scratch.ctypes.data
        return self._scratch_address


def look_along(grad: Tensor, direction: Tensor, before: Tensor) -> tuple[float, float, float]:
    """Inner products of two gradients with a direction; largest absolute entry of the first, NaN if one is."""
    kernel = library.vectors("look", grad.dtype)
    call: _Call | None = getattr(_kept, "call", None)
    if call is None or call.numel != len(grad):
        call = _kept.call = _Call(len(grad))
    sums = call.run(kernel, _LOOK, grad.data_ptr(), direction.data_ptr(), before.data_ptr(), sums=3)
    slope, slope_before = sums[:, :2].sum(0).tolist()
    bits = sums[:, 2].view(np.int64).max()
    largest = bits.view(np.float64) if grad.dtype == torch.float64 else bits.astype(np.int32).view(np.float32)
    return slope, slope_before, float(largest)


_kept = threading.local()  # the call of ``look_along``, one for each thread
