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
from descend.backends.cpu.columns import columns_of
from descend.backends.cpu.launch import CHUNK, NUMPY, ChunkCall, ScalarState, chunk_table
from descend.core.codecs import Formats, compute_dtype, element_dtype
from descend.core.decision import Decision
from descend.core.measures import moments
from descend.core.memory import row_width
from descend.core.noise import Stream
from descend.core.signature import signature

BLOCK = 64  # duplicates summed in sequence; more of one row are split, for threads and for precision
DIGIT = 12  # most bits of a digit of the radix sort

_GIVEN, _SUMMED, _ZERO = 0, 1, 2  # rows of the address table, by the source of the gradient


class _Arguments:
    """The int64 arguments of a loop of ``rows_kernel``, and its scratch arrays, which are reused and grow.

    The arguments are an ``array``: reading and writing single values takes a third of the time that NumPy takes.
    """

    def __init__(self, kernel: str, count: int) -> None:
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
        object_files.call(library.rows(self._kernel), self.address)


class TouchedRows:
    """Updates the rows that a sparse gradient touches, or all rows, the others with a gradient of zero.

    Args:
        rule: the function to apply.
        scalars: how many scalars it takes.
        formats: of the parameter, the gradient's values and the state tensors.
        all_rows: whether untouched rows are updated too, with a gradient of zero.
        stream: where the parameter's noise comes from, if there is noise.
    """

    def __init__(self, rule: Any, scalars: int, formats: Formats, all_rows: bool, stream: Stream | None = None) -> None:
        self._compute, self._columns, dtype = compute_dtype(formats), columns_of(formats), element_dtype(formats[1])
        self._scalars = np.zeros((1, 1 + scalars), NUMPY[self._compute])
        self._rule, self._n_scalars, self._formats, self._all_rows = rule, scalars, formats, all_rows
        self._keeps_rows_whole = signature(rule).kind == "row" or bool(self._columns.coded)
        self._update = self._measures = self._sums = 0
        self._addresses, self._dtype = np.zeros((3, self._columns.size), np.int64), dtype
        self._call, self._keys = ChunkCall(), np.zeros(1, np.uint64)
        self._call.set_keys(self._keys)
        if stream is not None:
            self._addresses[:, self._columns.stream : self._columns.stream + 2] = stream
        self._arguments = _Arguments("touched", 27)
        self._arguments.array[13], self._arguments.array[14] = CHUNK, BLOCK
        self._sum_arguments = _Arguments("sums", 9)
        self._buffer = np.empty(0, np.int64)
        self._zeros = np.zeros(CHUNK if all_rows else 0, NUMPY[dtype])
        self._addresses[_ZERO, 1] = self._zeros.ctypes.data
        self._reserved = (-1, -1)
        self._tables = self._buffer, self._buffer
        self._pointers: list[int] = []
        self._held: tuple[Any, ...] = ()
        self.rows = np.empty(0, np.int64)
        self._mark = array("q", bytes(40))

    @property
    def count(self) -> int:
        return len(self.rows)

    def compile(self, wants_norm: bool, measures: bool = False) -> None:
        self._update = library.update(self._rule, self._n_scalars, self._formats, self._compute)
        if measures:
            self._measures = library.measures(self._formats, self._compute, moments(self._rule))
        self._sums = library.rows("sums", self._dtype)
        for name in ("touched", "mark"):
            library.rows(name)
        library.sequence()
        if wants_norm:
            library.sums_of_squares(self._dtype, 1, self._columns.size)

    def read(
        self, indices: Tensor, values: Tensor, sizes: tuple[int, ...], steps: Tensor | None, step: int
    ) -> int | None:
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
        count = -(-slots * length * self._dtype.itemsize // 8)
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
        widths = np.full_like(begins, max(length, 1)) if self._keeps_rows_whole else None
        chunks = chunk_table(ends - begins, np.zeros(len(begins), np.int64), widths)
        chunks[:, 1] += begins[chunks[:, 0]]
        chunks[:, 0], chunks[:, 2] = _ZERO, 0
        return chunks

    def sum_of_squares(self) -> float:
        return self._call.sum_of_squares(1, self._dtype)

    def run(
        self,
        param: Tensor,
        state: Sequence[Tensor],
        scalars: Sequence[float | Tensor],
        scale: float,
        counters: ScalarState,
        mark: tuple[Tensor, int] | None,
        measures: bool = False,
        decision: Decision | None = None,
        noise_key: int = 0,
    ) -> None:
        assert decision is None  # this backend reads none
        self._scalars[0], self._keys[0] = (scale, *scalars), noise_key
        pointers = [param.data_ptr(), *(tensor.data_ptr() for tensor in state)]
        if pointers != self._pointers:
            self._pointers = pointers
            self._addresses[:, 0], self._addresses[:, 2 : 1 + len(pointers)] = pointers[0], pointers[1:]
            if self._columns.coded:
                self._addresses[:, self._columns.width] = row_width(param)
        update = self._call.measured_call(self._measures, self._update) if measures else self._call.call(self._update)
        calls = [update]
        if mark is not None:
            steps, step = mark
            calls.append(_mark_call(self._mark, self.rows, steps, step, have_state=True))
        threads.CallSequence([*calls, *counters.add_one_calls()]).run()

    def measured(self) -> np.ndarray:
        sums: np.ndarray = self._call.measured_chunks().sum(axis=0, keepdims=True)
        return sums

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
        self._arguments = _Arguments("stale", 26)
        self._calls, self._mark = (ChunkCall(), ChunkCall()), array("q", bytes(40))
        self._kernels = 0, 0
        self._positions = np.full(0, -1, np.int64)
        self._no_grad = torch.zeros(CHUNK, dtype=dtypes[0], device="cpu")  # what every chunk has in place of a gradient

    @property
    def rows(self) -> Tensor:
        return torch.from_numpy(self._rows)

    def compile(self) -> None:
        param, *state = self._dtypes
        self._kernels = (
            library.update(self._rules[0], self._n_scalars, (param, param, *state), self._compute),
            library.update(self._rules[1], 1, (param, param), self._compute),
        )
        for name in ("stale", "mark"):
            library.rows(name)
        library.sequence()

    def find(
        self, which: Tensor | range, sizes: tuple[int, ...], steps: Tensor, now: int, start: int
    ) -> tuple[np.ndarray, bool, bool] | None:
        arguments, length = self._arguments.array, math.prod(sizes[1:])
        if isinstance(which, range):
            count = len(which)
            arguments[0], arguments[1], arguments[11] = 0, count, which.start
        else:
            which = which.reshape(1, -1).long().contiguous()
            count = which.shape[1]
            self._arguments.set_indices(which, count, sizes[:1])
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
        threads.CallSequence(calls).run()

    def _call(self, index: int, chunks: np.ndarray, scalars: np.ndarray, param: Tensor, *state: Tensor) -> threads.Call:
        """The call of one of the two kernels."""
        table = np.ones((len(scalars), 1 + scalars.shape[1]), NUMPY[self._compute])
        table[:, 1:] = scalars
        addresses = np.array([[tensor.data_ptr() for tensor in (param, self._no_grad, *state)]], np.int64)
        self._calls[index].describe(chunks, len(chunks), addresses, table, self._elements)
        return self._calls[index].call(self._kernels[index])


def _mark_call(call: Any, rows: np.ndarray, steps: Tensor, step: int, have_state: bool) -> threads.Call:
    """The call that notes that ``rows`` are current at ``step``; those without state keep their negative sign."""
    call[:] = array("q", (rows.ctypes.data, len(rows), steps.data_ptr(), step, have_state))
    return threads.Call(library.rows("mark"), call.buffer_info()[0])
