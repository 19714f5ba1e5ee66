"""The arguments of one kernel call: addresses of tensors, the chunks they are cut into, and the scalars of the rule."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descend.backends.cpu import library, object_files, threads
from descend.backends.cpu.columns import columns_of
from descend.core.codecs import Formats, compute_dtype, rows_and_width, scale_shape
from descend.core.measures import COLUMNS, moments
from descend.core.memory import row_width
from descend.core.noise import Stream
from descend.core.signature import signature

# Elements in a chunk: small enough to balance the threads, large enough that claiming a chunk costs nothing. Norms are
# summed chunk by chunk, so their last bits depend on this constant and not on the number of threads.
CHUNK = 16_384

_CALL = 128  # bytes that ``measures_kernel`` keeps in front of a thread's scratch memory

NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


class ChunkCall:
    """The arguments of a compiled loop over chunks, in the order that ``kernels`` and ``measures_kernel`` list."""

    def __init__(self) -> None:
        self._arguments = array("q", bytes(112))
        self._address = self._arguments.buffer_info()[0]
        self._held: dict[int, np.ndarray] = {}
        self._elements = 0
        self._sums: np.ndarray | None = None
        self._measured = self._scratch = np.zeros((0, len(COLUMNS)))
        self._keys = np.zeros(0, np.uint64)

    def describe(
        self, chunks: np.ndarray, count: int, addresses: np.ndarray, scalars: np.ndarray, elements: int
    ) -> None:
        """Set what the next calls work on: the first ``count`` rows of ``chunks``, ``elements`` elements in all."""
        self._elements = elements
        self._arguments[1], self._arguments[4] = count, max(1, count // 64)
        for position, table in ((0, chunks), (2, addresses), (3, scalars)):
            if self._held.get(position) is not table:  # asking an array for its address takes a microsecond
                self._held[position] = table
                self._arguments[position] = table.ctypes.data

    def set_keys(self, keys: np.ndarray) -> None:
        """Set the table of what noise comes from: 64 bits for each row of scalars."""
        self._keys, self._arguments[13] = keys, keys.ctypes.data

    def run(self, kernel: int) -> None:
        """Call a compiled loop."""
        self._arguments[5] = 0
        threads.run(kernel, self._address, self._elements)

    def call(self, kernel: int) -> threads.Call:
        """The same as a part of a sequence."""
        return threads.Call(kernel, self._address, self._elements, self._address + 40)

    def measured_call(self, measures: int, update: int) -> threads.Call:
        """The call of the loop ``measures``, which runs ``update``; to be asked for again before each run."""
        chunks, workers, arguments = self._arguments[1], torch.get_num_threads(), self._arguments
        if len(self._measured) < chunks:
            self._measured = np.zeros((chunks, len(COLUMNS)))
            arguments[7] = self._measured.ctypes.data
        if len(self._scratch) < workers:
            self._scratch = np.empty((workers, _CALL // 8 + CHUNK))
            arguments[9], arguments[10] = self._scratch.ctypes.data, self._scratch.strides[0]
        arguments[8], arguments[11], arguments[12] = update, len(self._scratch), 0
        return self.call(measures)

    def measured_chunks(self) -> np.ndarray:
        """What the last such call has summed up, a row a chunk."""
        return self._measured[: self._arguments[1]]

    def sum_of_squares(self, column: int, dtype: torch.dtype) -> float:
        """Sum of the squares in one column of the address table, in float64, over fixed chunks in a fixed order."""
        return float(self.chunk_sums(library.sums_of_squares(dtype, column, self._held[2].shape[1])).sum())

    def chunk_sums(self, kernel: int, columns: int = 1) -> np.ndarray:
        """What a compiled loop sums in each chunk, shape (chunks, columns); valid until it is called again."""
        size = self._arguments[1] * columns
        if self._sums is None or len(self._sums) < size:
            self._sums = np.zeros(size)
        self._arguments[6] = self._sums.ctypes.data
        self.run(kernel)
        return self._sums[:size].reshape(-1, columns)


class ChunkTable(ChunkCall):
    """Tensors of equal dtypes: a row of addresses for each, and the chunks they are cut into.

    Args:
        columns: the tensors, column by column. At least one column, each of one dtype; the shapes in a row are equal.
        width: number of columns. The caller fills in those after ``columns``.
        rows: for each row of tensors, its row in the scalars table.
        scalars: the scalars table.
        widths: for each row of tensors, the width of its rows, if chunks must not cut them at will. Default: None.
    """

    def __init__(
        self,
        columns: Sequence[Sequence[Tensor]],
        width: int,
        rows: Sequence[int] | np.ndarray,
        scalars: np.ndarray,
        widths: np.ndarray | None = None,
    ) -> None:
        super().__init__()
        self.addresses = np.zeros((len(rows), width), np.int64)
        for column, tensors in enumerate(columns):
            self.addresses[:, column] = [tensor.data_ptr() for tensor in tensors]
        self._sizes = np.array([tensor.numel() for tensor in columns[0]], np.int64)
        self.scalars = scalars
        chunks = chunk_table(self._sizes, np.asarray(rows, np.int64), widths)
        self._counts = np.bincount(chunks[:, 0], minlength=len(rows))
        self.describe(chunks, len(chunks), self.addresses, scalars, int(self._sizes.sum()))

    def by_tensor(self, chunks: np.ndarray) -> np.ndarray:
        """Rows of chunks added in their order, a row a tensor: the bits do not depend on threads."""
        counts = self._counts
        if (counts == 1).all():
            return chunks.copy()
        sums, filled = np.zeros((len(counts), chunks.shape[1])), counts > 0
        if filled.any():
            starts = np.cumsum(counts) - counts
            sums[filled] = np.add.reduceat(chunks, starts[filled])
        return sums


class Launch(ChunkTable):
    """One kernel call for all parameters that share a rule and formats, see ``backend.Launch``.

    Args:
        rule: the function to apply.
        scalars: how many scalars it is given.
        formats: of the parameter, the gradient and the state tensors.
        params: the parameters; gradients in their layout.
        rows: for each parameter, its row in the scalars table.
        streams: where the noise of each parameter comes from, if there is noise.
    """

    def __init__(
        self,
        rule: Any,
        scalars: int,
        formats: Formats,
        params: Sequence[Tensor],
        rows: Sequence[int] | np.ndarray,
        streams: Sequence[Stream] = (),
    ) -> None:
        self._compute, columns = compute_dtype(formats), columns_of(formats)
        self._given = table = np.zeros((max(rows) + 1, scalars + 1), NUMPY[self._compute])
        self._rows, takes = np.asarray(rows, np.int64), signature(rule)
        self._has_sums = takes.summed is not None
        if self._has_sums:  # each parameter has scalars of its own beside those that it is given
            table = np.zeros((len(rows), 1 + len(takes.scalars)), table.dtype)
            rows = np.arange(len(rows))
        grads = [param if param.grad is None else param.grad for param in params]
        is_of_rows, is_coded = takes.kind == "row", bool(columns.coded)
        width_of = row_width if is_of_rows else lambda param: rows_and_width(param.shape)[1]
        widths = np.array([max(width_of(param), 1) for param in params], np.int64)
        super().__init__([params, grads], columns.size, rows, table, widths if is_of_rows or is_coded else None)
        self._rule, self._formats, self._columns = rule, formats, columns
        self._update = self._measures = self._summing = 0
        # How many elements are in each column that has an address.
        self._numels = np.repeat(self._sizes[:, None], len(columns.dtypes), axis=1)
        if is_of_rows:
            self._numels[:, 2:] = (self._sizes // widths)[:, None]
        if is_coded:
            self.addresses[:, columns.width] = widths
            self._numels[:, len(columns.elements) :] = [[scale_shape(param.shape).numel()] for param in params]
        if columns.stream >= 0:
            self.set_keys(np.zeros(len(table), np.uint64))
            for row, stream in enumerate(streams):
                self.addresses[row, columns.stream : columns.stream + 2] = stream

    def compile(self, wants_norm: bool, measures: bool = False) -> None:
        self._update = library.update(self._rule, self.scalars.shape[1] - 1, self._formats, self._compute)
        if self._has_sums:
            self._summing = library.sums(self._rule, self._formats, self._compute)
        for dtype in (torch.float32, torch.get_default_dtype()):
            library.scalar_state(dtype)
        if measures:
            self._measures = library.measures(self._formats, self._compute, moments(self._rule))
        library.sequence()
        library.versions()
        if wants_norm:
            library.sums_of_squares(self._columns.dtypes[1], 1, self._columns.size)

    def set_scalars(self, row: int, scale: float, scalars: Sequence[float | Tensor]) -> None:
        self._given[row] = (scale, *scalars)

    def set_noise(self, row: int, key: int) -> None:
        self._keys[self._rows == row if self._has_sums else row] = key

    def set_state(self, tensors: Sequence[Sequence[Tensor]]) -> None:
        """Store the addresses of what ``codecs.stored_names`` lists, one sequence for each parameter."""
        end = len(self._columns.dtypes)
        for row, state in zip(self.addresses, tensors, strict=True):
            row[2:end] = [tensor.data_ptr() for tensor in state]

    def written(self) -> np.ndarray:
        """First and last (exclusive) addresses of the memory that an update writes, shape (n, 2)."""
        dtypes = self._columns.dtypes
        columns = [column for column in range(len(dtypes)) if column != 1]
        starts = self.addresses[:, columns]
        ends = starts + self._numels[:, columns] * np.array([dtypes[column].itemsize for column in columns])
        spans = np.stack([starts.ravel(), ends.ravel()], axis=1)
        return spans[spans[:, 0] < spans[:, 1]]

    def update_call(self) -> threads.Call:
        """The call that applies the rule to everything."""
        return self.call(self._update)

    def measured_update_call(self) -> threads.Call:
        """The same; it also sums up what ``measured`` returns. To be asked for again before each run."""
        return self.measured_call(self._measures, self._update)

    def measured(self) -> np.ndarray:
        return self.by_tensor(self.measured_chunks())

    def sums(self) -> np.ndarray:
        self.scalars[:, : self._given.shape[1]] = self._given[self._rows]
        return self.by_tensor(self.chunk_sums(self._summing, signature(self._rule).sums))

    def set_formed(self, values: np.ndarray) -> None:
        self.scalars[:, self._given.shape[1] :] = values

    def sum_of_squares(self, column: int = 1, dtype: torch.dtype | None = None) -> float:
        """Of all gradients."""
        return super().sum_of_squares(column, dtype or self._columns.dtypes[1])


class ScalarState:
    """0-dim state tensors of many parameters, such as step counts, checked and set together, one call a dtype."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._parts = []
        for dtype in {tensor.dtype for tensor in tensors}:
            positions = np.array([i for i, tensor in enumerate(tensors) if tensor.dtype == dtype])
            self._parts.append(_ScalarPart([tensors[i] for i in positions], positions))

    def add_one_calls(self) -> list[threads.Call]:
        """Calls that add one to each."""
        return [part.call(_ADD_ONE) for part in self._parts]

    def write_calls(self) -> list[threads.Call]:
        """Calls that write what ``set_next`` was given."""
        return [part.call(_WRITE) for part in self._parts]

    def set_next(self, values: np.ndarray) -> None:
        """Set what the calls of ``write_calls`` write, in the order of the tensors."""
        for part in self._parts:
            part.expected[:] = values[part.positions]

    def is_unchanged(self) -> bool:
        """Whether nobody else has written any of them."""
        return all(part.is_as_expected() for part in self._parts)


_COMPARE, _ADD_ONE, _WRITE = 0, 1, 2  # what ``kernels.scalar_state_kernel`` does


class _ScalarPart:
    """The tensors of one dtype: their addresses, the values they should have, and the arguments of each action."""

    def __init__(self, tensors: Sequence[Tensor], positions: np.ndarray) -> None:
        self.positions = positions
        self.expected = np.array([tensor.item() for tensor in tensors])
        self._addresses = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
        self._kernel = library.scalar_state(tensors[0].dtype)
        common = self._addresses.ctypes.data, self.expected.ctypes.data, len(tensors)
        self._arguments = [array("q", (*common, action, 0)) for action in (_COMPARE, _ADD_ONE, _WRITE)]

    def call(self, action: int) -> threads.Call:
        return threads.Call(self._kernel, self._arguments[action].buffer_info()[0])

    def is_as_expected(self) -> bool:
        arguments = self._arguments[_COMPARE]
        arguments[4] = 0
        object_files.call(self._kernel, arguments.buffer_info()[0])
        return arguments[4] == 1


def chunk_table(sizes: np.ndarray, rows: np.ndarray, widths: np.ndarray | None = None) -> np.ndarray:
    """Cut tensors of these sizes into chunks.

    Args:
        sizes: the number of elements of each.
        rows: the row of scalars of each.
        widths: the width of the rows of each, in which chunks are of whole rows, and have their number in the last
            column. Longer rows than ``CHUNK`` are cut like tensors. Default: None, and chunks are cut anywhere.
    """
    stretches, most = sizes, np.full_like(sizes, CHUNK)
    if widths is not None:
        stretches, most = (
            np.where(widths > CHUNK, widths, sizes),
            np.where(widths > CHUNK, CHUNK, CHUNK // widths * widths),
        )
    per_stretch = -(-stretches // most)
    counts = np.where(sizes > 0, sizes // np.maximum(stretches, 1) * per_stretch, 0)
    tensor = np.repeat(np.arange(len(sizes)), counts)
    number = np.arange(counts.sum()) - (np.cumsum(counts) - counts)[tensor]
    stretch, piece = np.divmod(number, per_stretch[tensor])
    offset = stretch * stretches[tensor] + piece * most[tensor]
    length = np.minimum(stretches[tensor] - piece * most[tensor], most[tensor])
    times = np.ones_like(tensor) if widths is None else length // widths[tensor]
    return np.ascontiguousarray(np.stack([tensor, offset, offset, length, rows[tensor], times], axis=1))
