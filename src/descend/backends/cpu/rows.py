"""Tables for the rows that a sparse gradient touches: sorted, summed where they are named twice, a chunk each.

A chunk of a row is a chunk like any other, so that the compiled rules of dense parameters run on it as they are.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descend.backends.cpu import library, object_files, threads
from descend.backends.cpu.launch import CHUNK, NUMPY, Call, chunk_table

BLOCK = 64  # rows summed one after the other; longer runs of one row are split, for threads and for precision
DIGIT = 12  # bits of the largest digit that rows are sorted by

_GIVEN, _SUMMED, _ZERO = 0, 1, 2  # rows of the address table, by where the gradient is


class _Numbers:
    """What a loop of ``rows_kernel`` is told, and the arrays it works in: kept from step to step, made anew to grow.

    An ``array`` instead of NumPy's: reading and writing single numbers takes a third of the time.
    """

    def __init__(self, kernel: str, count: int) -> None:
        self._kernel = kernel
        self.array = array("q", bytes(8 * count))
        self.address = self.array.buffer_info()[0]
        self._scratch: dict[int, np.ndarray] = {}
        self._sizes: tuple[int, ...] = ()
        self._places = 0

    def scratch(self, position: int, count: int) -> np.ndarray:
        """The array whose address is the number at ``position``, of at least ``count`` int64; arbitrary content."""
        found = self._scratch.get(position)
        if found is None or len(found) < count:
            found = self._scratch[position] = np.empty(count + count // 4, np.int64)
            self.array[position] = found.ctypes.data
        return found

    def take_indices(self, indices: Tensor, places: int, sizes: tuple[int, ...]) -> None:
        """Prepare the sorting of the ``places`` of ``indices``, of shape (sparse dimensions, places)."""
        numbers = self.array
        numbers[0], numbers[1] = indices.data_ptr(), places
        if self._sizes != sizes:
            self._sizes = sizes
            row_bits = max(math.prod(sizes) - 1, 0).bit_length()
            passes = -(-row_bits // DIGIT)
            digit = -(-row_bits // passes) if passes else 0
            numbers[2], numbers[8], numbers[9] = len(sizes), passes, digit
            self.scratch(3, len(sizes))[: len(sizes)] = sizes
            self.scratch(6, 1 << digit)
        if self._places != places:
            self._places = places
            numbers[7] = max(places - 1, 0).bit_length()
            self.scratch(4, places)
            self.scratch(5, places)

    def call(self) -> None:
        """Run the loop on this thread."""
        object_files.call(library.rows(self._kernel), self.address)


class TouchedRows:
    """The update of the rows that a sparse gradient touches, or of all rows with zeros for the others.

    Args:
        rule: the function to apply.
        numbers: how many numbers it takes.
        dtypes: of the parameter, the gradient's values and the state tensors.
        all_rows: whether untouched rows are updated too, with a gradient of zero.
    """

    def __init__(self, rule: Any, numbers: int, dtypes: tuple[torch.dtype, ...], all_rows: bool) -> None:
        self._compute = torch.float64 if torch.float64 in dtypes else torch.float32
        self._scalars = np.zeros((1, numbers + 1), NUMPY[self._compute])
        self._rule, self._n_scalars, self._dtypes, self._all_rows = rule, numbers, dtypes, all_rows
        self._update = self._sums = 0
        self._addresses = np.zeros((3, len(dtypes)), np.int64)
        self._call = Call()
        self._numbers = _Numbers("touched", 27)
        self._numbers.array[13], self._numbers.array[14] = CHUNK, BLOCK
        self._sum_numbers = _Numbers("sums", 9)
        self._buffer = np.empty(0, np.int64)
        self._zeros = np.zeros(CHUNK if all_rows else 0, NUMPY[dtypes[1]])
        self._addresses[_ZERO, 1] = self._zeros.ctypes.data
        self._ready_for = (-1, -1)
        self._tables = self._buffer, self._buffer
        self._places: list[int] = []
        self._held: tuple[Any, ...] = ()
        self.rows = np.empty(0, np.int64)
        self._mark = array("q", bytes(40))

    def compile(self, wants_norm: bool) -> None:
        self._update = library.update(self._rule, self._n_scalars, self._dtypes, self._compute)
        self._sums = library.rows("sums", self._dtypes[1])
        for name in ("touched", "mark"):
            library.rows(name)
        if wants_norm:
            library.sums_of_squares(self._dtypes[1], 1, len(self._dtypes))

    def read(
        self, indices: Tensor, values: Tensor, sizes: tuple[int, ...], steps: Tensor | None, step: int
    ) -> int | None:
        places, length = len(values), math.prod(values.shape[1:])
        self._numbers.take_indices(indices, places, sizes)
        chunks, rows = self._ready(places, length)
        numbers = self._numbers.array
        numbers[19], numbers[20] = 0 if steps is None else steps.data_ptr(), step
        self._numbers.call()
        if numbers[10] >= 0:
            index = tuple(indices[:, numbers[10]].tolist())
            raise IndexError(f"index {index} is out of range for a table of {sizes} rows")
        late, n_chunks, n_rows, n_sums, n_sums_of_sums, slots = numbers[21:]
        if late >= 0:
            return late
        self.rows, given = rows[:n_rows], values.data_ptr()
        if slots:
            self._sum(given, places, length, slots, n_sums, n_sums_of_sums)
        table, elements = chunks, n_rows * length
        if self._all_rows:
            table = np.concatenate([table[: 6 * n_chunks].reshape(-1, 6), self._gaps(math.prod(sizes), length)])
            n_chunks, elements = len(table), math.prod(sizes) * length
        self._addresses[_GIVEN, 1] = given
        self._call.describe(table, n_chunks, self._addresses, self._scalars, elements)
        self._held = indices, values
        return None

    def _ready(self, places: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tables of chunks and of rows for so many places; those of sums too."""
        if (places, length) != self._ready_for:
            self._ready_for, self._numbers.array[12], blocks = (places, length), length, places // BLOCK + 1
            self._numbers.scratch(17, 4 * (places // 2 + blocks))
            self._numbers.scratch(18, 4 * blocks)
            self._tables = (
                self._numbers.scratch(15, 6 * places * -(-length // CHUNK)),
                self._numbers.scratch(16, places),
            )
        return self._tables

    def _sum(self, given: int, places: int, length: int, slots: int, n_sums: int, n_sums_of_sums: int) -> None:
        """Sum the rows that are named more than once."""
        count = -(-slots * length * self._dtypes[1].itemsize // 8)
        if len(self._buffer) < count:
            self._buffer = np.empty(count + count // 4, np.int64)
            self._addresses[_SUMMED, 1] = self._sum_numbers.array[6] = self._buffer.ctypes.data
        numbers, told = self._sum_numbers.array, self._numbers.array
        numbers[2], numbers[3], numbers[4], numbers[7], numbers[8] = told[11], told[7], given, length, places
        for tasks, count, summands in ((told[17], n_sums, places), (told[18], n_sums_of_sums, n_sums)):
            if count:
                numbers[0], numbers[1], numbers[5] = tasks, count, 0
                threads.run(self._sums, self._sum_numbers.address, summands * length)

    def _gaps(self, total: int, length: int) -> np.ndarray:
        """Chunks of the rows that are not touched; all of them read the same zeros."""
        begins, ends = np.r_[0, self.rows + 1] * length, np.r_[self.rows, total] * length
        chunks = chunk_table(ends - begins, np.zeros(len(begins), np.int64))
        chunks[:, 1] += begins[chunks[:, 0]]
        chunks[:, 0], chunks[:, 2] = _ZERO, 0
        return chunks

    def sum_of_squares(self) -> float:
        return self._call.sum_of_squares(1, self._dtypes[1])

    def run(
        self,
        param: Tensor,
        state: Sequence[Tensor],
        scalars: Sequence[float],
        scale: float,
        counters: Any,
        mark: tuple[Tensor, int] | None,
    ) -> None:
        self._scalars[0] = (scale, *scalars)
        places = [param.data_ptr(), *(tensor.data_ptr() for tensor in state)]
        if places != self._places:
            self._places = places
            self._addresses[:, 0], self._addresses[:, 2:] = places[0], places[1:]
        calls = [self._call.call(self._update)]
        if mark is not None:
            steps, step = mark
            calls.append(_mark_call(self._mark, self.rows, steps, step, have_state=True))
        threads.run_together([*calls, *counters.add_one_calls()])

    def release(self) -> None:
        self._held = ()


class StaleRows:
    """Brings rows up to date that have missed steps, see ``backend.CatchUp``.

    Args:
        with_state: the rule for rows with state.
        without_state: the rule for rows whose state is zero; it takes one scalar.
        scalars: how many scalars ``with_state`` takes.
        dtypes: of the parameter and the state tensors.
    """

    def __init__(self, with_state: Any, without_state: Any, scalars: int, dtypes: tuple[torch.dtype, ...]) -> None:
        self._rules, self._n_scalars, self._dtypes = (with_state, without_state), scalars, dtypes
        self._compute = torch.float64 if torch.float64 in dtypes else torch.float32
        self._numbers = _Numbers("stale", 26)
        self._calls, self._mark = (Call(), Call()), array("q", bytes(40))
        self._kernels = 0, 0
        self._positions = np.full(0, -1, np.int64)
        self._no_grad = torch.zeros(CHUNK, dtype=dtypes[0])  # what every chunk has in place of a gradient

    def compile(self) -> None:
        param, *state = self._dtypes
        self._kernels = (
            library.update(self._rules[0], self._n_scalars, (param, param, *state), self._compute),
            library.update(self._rules[1], 1, (param, param), self._compute),
        )
        for name in ("stale", "mark"):
            library.rows(name)

    def find(
        self, which: Tensor | range, sizes: tuple[int, ...], steps: Tensor, now: int, start: int
    ) -> tuple[np.ndarray, bool, bool] | None:
        numbers, length = self._numbers.array, math.prod(sizes[1:])
        if isinstance(which, range):
            places = len(which)
            numbers[0], numbers[1], numbers[11] = 0, places, which.start
        else:
            which = which.reshape(1, -1).long().contiguous()
            places = which.shape[1]
            self._numbers.take_indices(which, places, sizes[:1])
        if len(self._positions) <= now - start:
            self._positions = np.full(2 * (now - start) + 64, -1, np.int64)
            numbers[17] = self._positions.ctypes.data
        numbers[12], numbers[13], numbers[14], numbers[15], numbers[16] = length, CHUNK, steps.data_ptr(), now, start
        scratch, size = self._numbers.scratch, 6 * places * -(-length // CHUNK)
        distinct, used, unused, rows = (
            scratch(18, now - start + 1), scratch(19, size), scratch(20, size), scratch(21, places),
        )  # fmt: skip
        self._numbers.call()
        if numbers[0] and numbers[10] >= 0:
            return None
        n_used, n_unused, n_rows, n_steps = numbers[22:]
        self._used, self._unused = used[: 6 * n_used].reshape(-1, 6), unused[: 6 * n_unused].reshape(-1, 6)
        self._rows, self._elements = rows[:n_rows], n_rows * length
        self._steps, self._now = steps, now
        return distinct[:n_steps], n_used > 0, n_unused > 0

    def run(
        self,
        param: Tensor,
        state: Sequence[Tensor],
        scalars: np.ndarray | None,
        factors: np.ndarray | None,
        mark: bool,
    ) -> None:
        calls = []
        if mark:  # first, while the marks are still in the caches
            calls.append(_mark_call(self._mark, self._rows, self._steps, self._now, have_state=False))
        if scalars is not None:
            chunks, rounds = self._used, len(scalars)
            if rounds > 1:
                chunks[:, 4] *= rounds
                chunks[:, 5] = rounds
            table = scalars.transpose(1, 0, 2).reshape(-1, scalars.shape[2])
            calls.append(self._call(0, chunks, table, param, *state))
        if factors is not None:
            calls.append(self._call(1, self._unused, factors[:, None], param))
        threads.run_together(calls)

    def _call(
        self, index: int, chunks: np.ndarray, numbers: np.ndarray, param: Tensor, *state: Tensor
    ) -> tuple[int, int, int]:
        """The call of one of the two kernels."""
        scalars = np.ones((len(numbers), numbers.shape[1] + 1), NUMPY[self._compute])
        scalars[:, 1:] = numbers
        addresses = np.array([[tensor.data_ptr() for tensor in (param, self._no_grad, *state)]], np.int64)
        self._calls[index].describe(chunks, len(chunks), addresses, scalars, self._elements)
        return self._calls[index].call(self._kernels[index])


def _mark_call(call: Any, rows: np.ndarray, steps: Tensor, step: int, have_state: bool) -> tuple[int, int, int]:
    """The call that notes that ``rows`` are current at ``step``; those without state keep their negative sign."""
    call[:] = array("q", (rows.ctypes.data, len(rows), steps.data_ptr(), step, have_state))
    return library.rows("mark"), call.buffer_info()[0], 0
