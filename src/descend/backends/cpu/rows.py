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

    def __init__(self, kernel: int, count: int) -> None:
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
        object_files.call(self._kernel, self.address)


def load_reader(dtype: torch.dtype) -> None:
    """Load what reads gradients of ``dtype``, float32 or float64."""
    library.rows("touched")
    library.rows("sums", dtype)


class TouchedRows:
    """The update of the rows that a sparse gradient touches, or of all rows with zeros for the others.

    Args:
        rule: the function to apply.
        numbers: how many numbers it takes.
        dtypes: of the parameter, the gradient's values and the state tensors.
        all_rows: whether untouched rows are updated too, with a gradient of zero.
    """

    def __init__(self, rule: Any, numbers: int, dtypes: tuple[torch.dtype, ...], all_rows: bool) -> None:
        compute = torch.float64 if torch.float64 in dtypes else torch.float32
        self._scalars = np.zeros((1, numbers + 1), NUMPY[compute])
        self._update = library.update(rule, numbers, dtypes, compute)
        self._dtypes, self._all_rows = dtypes, all_rows
        self._addresses = np.zeros((3, len(dtypes)), np.int64)
        self._call = Call()
        self._numbers = _Numbers(library.rows("touched"), 27)
        self._numbers.array[13], self._numbers.array[14] = CHUNK, BLOCK
        self._sums = library.rows("sums", dtypes[1])
        self._sum_numbers = _Numbers(self._sums, 9)
        self._buffer = np.empty(0, np.int64)
        self._zeros = np.zeros(CHUNK if all_rows else 0, NUMPY[dtypes[1]])
        self._addresses[_ZERO, 1] = self._zeros.ctypes.data
        self._ready_for = (-1, -1)
        self._tables = self._buffer, self._buffer
        self._places: list[int] = []
        self._held: tuple[Any, ...] = ()
        self.rows = np.empty(0, np.int64)

    def read(
        self, indices: Tensor, values: Tensor, sizes: tuple[int, ...], steps: Tensor | None, step: int
    ) -> int | None:
        """Take in a gradient: its rows sorted, those named twice summed. Nothing but scratch memory is written.

        Args:
            indices: of shape (sparse dimensions, places), contiguous.
            values: of shape (places, ...), contiguous, float32 or float64.
            sizes: of the sparse dimensions.
            steps: int32, the step each row is current at, if that is to be checked; a sign plays no part.
            step: the step it must be.
        Returns:
            A row that is current at another step; None if there is none.
        Raises:
            IndexError: if an index is out of range.
        """
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
        """Of the gradient's rows, summed first where they are named twice."""
        return self._call.sum_of_squares(1, self._dtypes[1])

    def update(self, param: Tensor, state: Sequence[Tensor], numbers: Sequence[Any], scale: float) -> None:
        """Apply the rule to the gradient times ``scale``."""
        self._scalars[0] = (scale, *numbers)
        places = [param.data_ptr(), *(tensor.data_ptr() for tensor in state)]
        if places != self._places:
            self._places = places
            self._addresses[:, 0], self._addresses[:, 2:] = places[0], places[1:]
        self._call.run(self._update)

    def forget(self) -> None:
        """Let go of the gradient."""
        self._held = ()

    def warm_up_norm(self) -> None:
        """Load what ``sum_of_squares`` calls."""
        library.sums_of_squares(self._dtypes[1], 1, len(self._dtypes))


class StaleRows:
    """Brings rows up to date that have missed steps: one kernel for rows with state, one for rows without.

    Args:
        coast: the rule for rows with state.
        decay: the rule for rows whose state is zero, it takes one number.
        numbers: how many numbers ``coast`` takes.
        dtypes: of the parameter and the state tensors.
    """

    def __init__(self, coast: Any, decay: Any, numbers: int, dtypes: tuple[torch.dtype, ...]) -> None:
        param, *state = dtypes
        self._compute = torch.float64 if torch.float64 in dtypes else torch.float32
        self._coast = library.update(coast, numbers, (param, param, *state), self._compute)
        self._decay = library.update(decay, 1, (param, param), self._compute)
        self._numbers, self._call = _Numbers(library.rows("stale"), 26), Call()
        self._positions = np.full(0, -1, np.int64)
        self._no_grad = torch.zeros(CHUNK, dtype=param, device="cpu")  # what every chunk has in place of a gradient

    def find(
        self, which: Tensor | range, sizes: tuple[int, ...], length: int, steps: Tensor, now: int, start: int
    ) -> np.ndarray | None:
        """The distinct steps at which stale rows are current, among those named or in a range of rows.

        Args:
            which: indices of rows, int64 of shape (1, n), contiguous; or a range of rows.
            sizes: how many rows there are, a tuple of one.
            length: numbers in a row.
            steps: int32, the step each row is current at; negative while its state is zero.
            now: the step to bring rows to.
            start: no row is further behind than this step.
        Returns:
            None if an index is out of range.
        """
        numbers = self._numbers.array
        if isinstance(which, range):
            places = len(which)
            numbers[0], numbers[1], numbers[11] = 0, places, which.start
        else:
            places = which.shape[1]
            self._numbers.take_indices(which, places, sizes)
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
        self.rows, self._elements = rows[:n_rows], n_rows * length
        return distinct[:n_steps]

    @property
    def has_used(self) -> bool:
        """Whether any of the rows found has state."""
        return len(self._used) > 0

    @property
    def has_unused(self) -> bool:
        """Whether any of the rows found has none."""
        return len(self._unused) > 0

    def coast(self, param: Tensor, state: Sequence[Tensor], numbers: np.ndarray) -> None:
        """Apply ``coast`` to the rows found that have state; ``numbers``: for each distinct step, in each round."""
        chunks, rounds = self._used, len(numbers)
        if rounds > 1:
            chunks[:, 4] *= rounds
            chunks[:, 5] = rounds
        numbers = numbers.transpose(1, 0, 2).reshape(-1, numbers.shape[2])
        self._run(self._coast, chunks, numbers, param, *state)

    def decay(self, param: Tensor, factors: np.ndarray) -> None:
        """Apply ``decay`` to the rows found that have none, with a factor for each distinct step."""
        self._run(self._decay, self._unused, factors[:, None], param)

    def _run(self, kernel: int, chunks: np.ndarray, numbers: np.ndarray, param: Tensor, *state: Tensor) -> None:
        if len(chunks):
            scalars = np.ones((len(numbers), numbers.shape[1] + 1), NUMPY[self._compute])
            scalars[:, 1:] = numbers
            addresses = np.array([[tensor.data_ptr() for tensor in (param, self._no_grad, *state)]], np.int64)
            self._call.describe(chunks, len(chunks), addresses, scalars, self._elements)
            self._call.run(kernel)


def mark(rows: np.ndarray, steps: Tensor, step: int, have_state: bool) -> None:
    """Note that ``rows`` are current at ``step``; those without state keep their negative sign."""
    call = np.array([rows.ctypes.data, len(rows), steps.data_ptr(), step, have_state], np.int64)
    object_files.call(library.rows("mark"), call.ctypes.data)
