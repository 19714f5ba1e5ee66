"""Updates the rows that a sparse gradient touches: sorts the indices, sums duplicates, makes a chunk of each row.

Chunks of rows are like any other, so they run through the kernels of dense parameters. ``nnz``, as in torch, is the
number of entries of a gradient: its indices, with duplicates.
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
from descend.backends.cpu.launch import CHUNK, NUMPY, ChunkCall, chunk_table

BLOCK = 64  # duplicates summed in sequence; more of one row are split, for threads and for precision
DIGIT = 12  # most bits of a digit of the radix sort

_GIVEN, _SUMMED, _ZERO = 0, 1, 2  # rows of the address table, by the source of the gradient


class _Arguments:
    """The int64 arguments of a loop of ``rows_kernel``, and its scratch arrays, which are reused and grow.

    The arguments are an ``array``: reading and writing single values takes a third of the time that NumPy takes.
    """

    def __init__(self, kernel: int, count: int) -> None:
        self._kernel = kernel
        self.array = array("q", bytes(8 * count))
        self.address = self.array.buffer_info()[0]
        self._scratch: dict[int, np.ndarray] = {}
        self._sizes: tuple[int, ...] = ()
        self._nnz = 0

    def scratch(self, position: int, count: int) -> np.ndarray:
        """The array whose address is the argument at ``position``: at least ``count`` int64, not initialized."""
        scratch = self._scratch.get(position)
        if scratch is None or len(scratch) < count:
            scratch = self._scratch[position] = np.empty(count + count // 4, np.int64)
            self.array[position] = scratch.ctypes.data
        return scratch

    def set_indices(self, indices: Tensor, nnz: int, sizes: tuple[int, ...]) -> None:
        """Prepare the sorting of ``indices``, of shape (sparse dimensions, nnz)."""
        arguments = self.array
        arguments[0], arguments[1] = indices.data_ptr(), nnz
        if self._sizes != sizes:
            self._sizes = sizes
            row_bits = max(math.prod(sizes) - 1, 0).bit_length()
            passes = -(-row_bits // DIGIT)
            digit = -(-row_bits // passes) if passes else 0
            arguments[2], arguments[8], arguments[9] = len(sizes), passes, digit
            self.scratch(3, len(sizes))[: len(sizes)] = sizes
            self.scratch(6, 1 << digit)
        if self._nnz != nnz:
            self._nnz = nnz
            arguments[7] = max(nnz - 1, 0).bit_length()
            self.scratch(4, nnz)
            self.scratch(5, nnz)

    def call(self) -> None:
        """Run the loop on this thread."""
        object_files.call(self._kernel, self.address)


def load_reader(dtype: torch.dtype) -> None:
    """Load the loops that read gradients of ``dtype``, float32 or float64."""
    library.rows("touched")
    library.rows("sums", dtype)


class TouchedRows:
    """Updates the rows that a sparse gradient touches, or all rows, the others with a gradient of zero.

    Args:
        rule: the function to apply.
        scalars: how many scalars it takes.
        dtypes: of the parameter, the gradient's values and the state tensors.
        all_rows: whether untouched rows are updated too, with a gradient of zero.
    """

    def __init__(self, rule: Any, scalars: int, dtypes: tuple[torch.dtype, ...], all_rows: bool) -> None:
        compute = torch.float64 if torch.float64 in dtypes else torch.float32
        self._scalars = np.zeros((1, 1 + scalars), NUMPY[compute])
        self._update = library.update(rule, scalars, dtypes, compute)
        self._dtypes, self._all_rows = dtypes, all_rows
        self._addresses = np.zeros((3, len(dtypes)), np.int64)
        self._call = ChunkCall()
        self._arguments = _Arguments(library.rows("touched"), 27)
        self._arguments.array[13], self._arguments.array[14] = CHUNK, BLOCK
        self._sums = library.rows("sums", dtypes[1])
        self._sum_arguments = _Arguments(self._sums, 9)
        self._buffer = np.empty(0, np.int64)
        self._zeros = np.zeros(CHUNK if all_rows else 0, NUMPY[dtypes[1]])
        self._addresses[_ZERO, 1] = self._zeros.ctypes.data
        self._reserved = (-1, -1)
        self._tables = self._buffer, self._buffer
        self._pointers: list[int] = []
        self._held: tuple[Any, ...] = ()
        self.rows = np.empty(0, np.int64)

    def read(
        self, indices: Tensor, values: Tensor, sizes: tuple[int, ...], steps: Tensor | None, step: int
    ) -> int | None:
        """Read a gradient: sort its rows and sum duplicates. Nothing but scratch memory is written.

        Args:
            indices: of shape (sparse dimensions, nnz), contiguous.
            values: of shape (nnz, ...), contiguous, float32 or float64.
            sizes: of the sparse dimensions.
            steps: int32, the step each row is current at, if that is to be checked; the sign is ignored.
            step: the step it must be.
        Returns:
            A row that is current at another step; None if there is none.
        Raises:
            IndexError: if an index is out of range.
        """
        nnz, length = len(values), math.prod(values.shape[1:])
        self._arguments.set_indices(indices, nnz, sizes)
        chunks, rows = self._reserve(nnz, length)
        arguments = self._arguments.array
        arguments[19], arguments[20] = 0 if steps is None else steps.data_ptr(), step
        self._arguments.call()
        if arguments[10] >= 0:
            index = tuple(indices[:, arguments[10]].tolist())
            raise IndexError(f"index {index} is out of range for a table of {sizes} rows")
        late, n_chunks, n_rows, n_sums, n_sums_of_sums, slots = arguments[21:]
        if late >= 0:
            return late
        self.rows, given = rows[:n_rows], values.data_ptr()
        if slots:
            self._sum(given, nnz, length, slots, n_sums, n_sums_of_sums)
        table, elements = chunks, n_rows * length
        if self._all_rows:
            table = np.concatenate([table[: 6 * n_chunks].reshape(-1, 6), self._gaps(math.prod(sizes), length)])
            n_chunks, elements = len(table), math.prod(sizes) * length
        self._addresses[_GIVEN, 1] = given
        self._call.describe(table, n_chunks, self._addresses, self._scalars, elements)
        self._held = indices, values
        return None

    def _reserve(self, nnz: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Scratch for the chunks and the rows of ``nnz`` entries; for the sums too."""
        if (nnz, length) != self._reserved:
            self._reserved, self._arguments.array[12], blocks = (nnz, length), length, nnz // BLOCK + 1
            self._arguments.scratch(17, 4 * (nnz // 2 + blocks))
            self._arguments.scratch(18, 4 * blocks)
            self._tables = (
                self._arguments.scratch(15, 6 * nnz * -(-length // CHUNK)),
                self._arguments.scratch(16, nnz),
            )
        return self._tables

    def _sum(self, given: int, nnz: int, length: int, slots: int, n_sums: int, n_sums_of_sums: int) -> None:
        """Sum the values of rows that have duplicates."""
        count = -(-slots * length * self._dtypes[1].itemsize // 8)
        if len(self._buffer) < count:
            self._buffer = np.empty(count + count // 4, np.int64)
            self._addresses[_SUMMED, 1] = self._sum_arguments.array[6] = self._buffer.ctypes.data
        sums, touched = self._sum_arguments.array, self._arguments.array
        sums[2], sums[3], sums[4], sums[7], sums[8] = touched[11], touched[7], given, length, nnz
        for tasks, count, summands in ((touched[17], n_sums, nnz), (touched[18], n_sums_of_sums, n_sums)):
            if count:
                sums[0], sums[1], sums[5] = tasks, count, 0
                threads.run(self._sums, self._sum_arguments.address, summands * length)

    def _gaps(self, total: int, length: int) -> np.ndarray:
        """Chunks of the untouched rows; all of them read the same zeros."""
        begins, ends = np.r_[0, self.rows + 1] * length, np.r_[self.rows, total] * length
        chunks = chunk_table(ends - begins, np.zeros(len(begins), np.int64))
        chunks[:, 1] += begins[chunks[:, 0]]
        chunks[:, 0], chunks[:, 2] = _ZERO, 0
        return chunks

    def sum_of_squares(self) -> float:
        """Sum of the squares of the gradient, after its duplicates are summed."""
        return self._call.sum_of_squares(1, self._dtypes[1])

    def update(self, param: Tensor, state: Sequence[Tensor], scalars: Sequence[Any], scale: float) -> None:
        """Apply the rule to the gradient times ``scale``."""
        self._scalars[0] = (scale, *scalars)
        pointers = [param.data_ptr(), *(tensor.data_ptr() for tensor in state)]
        if pointers != self._pointers:
            self._pointers = pointers
            self._addresses[:, 0], self._addresses[:, 2:] = pointers[0], pointers[1:]
        self._call.run(self._update)

    def forget(self) -> None:
        """Drop the reference to the gradient."""
        self._held = ()

    def warm_up_norm(self) -> None:
        """Load what ``sum_of_squares`` calls."""
        library.sums_of_squares(self._dtypes[1], 1, len(self._dtypes))


class StaleRows:
    """Applies missed steps to stale rows: one kernel for rows with state, one for rows without.

    Args:
        coast: the rule for rows with state.
        decay: the rule for rows whose state is zero; it takes one scalar.
        scalars: how many scalars ``coast`` takes.
        dtypes: of the parameter and the state tensors.
    """

    def __init__(self, coast: Any, decay: Any, scalars: int, dtypes: tuple[torch.dtype, ...]) -> None:
        param, *state = dtypes
        self._compute = torch.float64 if torch.float64 in dtypes else torch.float32
        self._coast = library.update(coast, scalars, (param, param, *state), self._compute)
        self._decay = library.update(decay, 1, (param, param), self._compute)
        self._arguments, self._call = _Arguments(library.rows("stale"), 26), ChunkCall()
        self._positions = np.full(0, -1, np.int64)
        self._no_grad = torch.zeros(CHUNK, dtype=param)  # the gradient of every chunk

    def find(
        self, which: Tensor | range, sizes: tuple[int, ...], length: int, steps: Tensor, now: int, start: int
    ) -> np.ndarray | None:
        """Find stale rows among some rows; return the distinct steps that they are current at.

        Args:
            which: indices of rows, int64 of shape (1, n), contiguous; or a range of rows.
            sizes: how many rows there are, a tuple of one.
            length: elements in a row.
            steps: int32, the step each row is current at; negative while its state is zero.
            now: the step that rows are brought to.
            start: the earliest step that a row may be current at.
        Returns:
            None if an index is out of range.
        """
        arguments = self._arguments.array
        if isinstance(which, range):
            count = len(which)
            arguments[0], arguments[1], arguments[11] = 0, count, which.start
        else:
            count = which.shape[1]
            self._arguments.set_indices(which, count, sizes)
        if len(self._positions) <= now - start:
            self._positions = np.full(2 * (now - start) + 64, -1, np.int64)
            arguments[17] = self._positions.ctypes.data
        arguments[12:17] = array("q", (length, CHUNK, steps.data_ptr(), now, start))
        scratch, size = self._arguments.scratch, 6 * count * -(-length // CHUNK)
        distinct, used, unused, rows = (
            scratch(18, now - start + 1), scratch(19, size), scratch(20, size), scratch(21, count),
        )  # fmt: skip
        self._arguments.call()
        if arguments[0] and arguments[10] >= 0:
            return None
        n_used, n_unused, n_rows, n_steps = arguments[22:]
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

    def coast(self, param: Tensor, state: Sequence[Tensor], scalars: np.ndarray) -> None:
        """Apply ``coast`` to the rows found that have state. Shape of ``scalars``: (rounds, steps, scalars)."""
        chunks, rounds = self._used, len(scalars)
        if rounds > 1:
            chunks[:, 4] *= rounds
            chunks[:, 5] = rounds
        scalars = scalars.transpose(1, 0, 2).reshape(-1, scalars.shape[2])
        self._run(self._coast, chunks, scalars, param, *state)

    def decay(self, param: Tensor, factors: np.ndarray) -> None:
        """Apply ``decay`` to the rows found that have none, with a factor for each distinct step."""
        self._run(self._decay, self._unused, factors[:, None], param)

    def _run(self, kernel: int, chunks: np.ndarray, scalars: np.ndarray, param: Tensor, *state: Tensor) -> None:
        if len(chunks):
            table = np.ones((len(scalars), 1 + scalars.shape[1]), NUMPY[self._compute])
            table[:, 1:] = scalars
            addresses = np.array([[tensor.data_ptr() for tensor in (param, self._no_grad, *state)]], np.int64)
            self._call.describe(chunks, len(chunks), addresses, table, self._elements)
            self._call.run(kernel)


def mark(rows: np.ndarray, steps: Tensor, step: int, have_state: bool) -> None:
    """Record that ``rows`` are current at ``step``. Rows without state keep their negative sign."""
    arguments = np.array([rows.ctypes.data, len(rows), steps.data_ptr(), step, have_state], np.int64)
    object_files.call(library.rows("mark"), arguments.ctypes.data)
