"""One rule on all dense parameters of equal formats: its tables on the device, and its kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from descend.backends.eager import measured_sums
from descend.backends.opened import Opened
from descend.backends.triton import formats_library, library, tuning
from descend.backends.triton.tables import Numbers, Table, constants, current, is_capturing, keep, uploaded
from descend.core.codecs import (
    Codec,
    Formats,
    compute_dtype,
    is_plain,
    rows_and_width,
    scale_shape,
    stored_dtypes,
)
from descend.core.decision import Decision
from descend.core.measures import moments
from descend.core.noise import Stream
from descend.core.signature import signature


class Pieces(NamedTuple):
    """How programs share tensors.

    Attributes:
        table: of chunks, on the device; it never changes.
        of_tensor: which tensor each chunk belongs to.
    """

    table: Tensor
    of_tensor: np.ndarray

    @classmethod
    def of(cls, chunks: np.ndarray, device: torch.device) -> Pieces:
        """A table of chunks that is not on the device yet."""
        return cls(uploaded(chunks, device), chunks[:, 0])

    @property
    def programs(self) -> int:
        return len(self.of_tensor)


class Chunks:
    """Tensors of one device as chunks, and the sum of the squares of one column of their addresses.

    Args:
        sizes: of the tensors.
        rows: for each tensor, its row in a table of scalars.
        addresses: a row a tensor; the caller may change them.
        device: where the tensors are.
    """

    def __init__(
        self, sizes: np.ndarray, rows: Sequence[int] | np.ndarray, addresses: np.ndarray, device: torch.device
    ) -> None:
        self.addresses, self.device = addresses, device
        self.pieces = Pieces.of(tuning.chunk_table(sizes, np.asarray(rows, np.int64)), device)
        self.table = Table(addresses.shape, torch.int64, device)
        self._norm: _Norm | None = None

    def upload(self, is_capturing: bool) -> None:
        """Bring the addresses up to date. Chunks never change."""
        self.table.upload(self.addresses, is_capturing)
        if is_capturing:
            keep(self.pieces, self._norm)

    def compile_norm(self, column: int, dtype: torch.dtype) -> None:
        """Compile what ``sum_of_squares`` launches."""
        if self._norm is None:
            self._norm = _Norm(self, column, dtype)

    def sum_of_squares(self) -> Tensor:
        """In float64, shape (); written again by the next call."""
        assert self._norm is not None
        with current(self.device):
            self.upload(is_capturing(self.device))
            return self._norm.run()


class _Norm:
    """The two launches that sum squares: of each chunk, then of the chunks' sums, both in a fixed order."""

    def __init__(self, chunks: Chunks, column: int, dtype: torch.dtype) -> None:
        device, count, interpreted = chunks.device, chunks.pieces.programs, library.interprets()
        self._sums = torch.empty(max(count, 1), dtype=torch.float64, device=device)
        self._result = torch.empty((), dtype=torch.float64, device=device)
        columns = chunks.addresses.shape[1]
        squares, total = library.sums_of_squares(dtype, column, columns, interpreted), library.total(interpreted)
        self._launches = [total.bind(1, device, self._sums, count, self._result)]
        if count:
            self._launches.insert(0, squares.bind(count, device, chunks.pieces.table, chunks.table.tensor, self._sums))

    def run(self) -> Tensor:
        for launch in self._launches:
            launch()
        return self._result


class _Sums:
    """The two launches that sum what the part of a rule returns: over each chunk, then over the chunks of a tensor."""

    def __init__(self, kernel: library.Kernel, pieces: Pieces, tensors: int, tables: Sequence[Tensor]) -> None:
        device, width = pieces.table.device, kernel.constants["SUMS"]
        totals = library.totals(width, library.interprets())
        sums = torch.empty((max(pieces.programs, 1), width), dtype=torch.float64, device=device)
        self._result = torch.zeros((tensors, width), dtype=torch.float64, device=device)
        of_tensor = np.bincount(pieces.of_tensor, minlength=tensors)
        spans = uploaded(np.stack([np.cumsum(of_tensor) - of_tensor, of_tensor], axis=1).astype(np.int64), device)
        self._launches = []
        if pieces.programs:
            self._launches = [
                kernel.bind(pieces.programs, device, pieces.table, *tables, sums),
                totals.bind(tensors, device, sums, spans, self._result),
            ]

    def run(self) -> Tensor:
        for launch in self._launches:
            launch()
        return self._result


class Launch:
    """See ``backend.Launch``.

    Args:
        rule: the function to apply.
        scalars: how many scalars it is given.
        formats: of the parameter, the gradient and the state.
        params: the parameters, all on one device; gradients in their layout.
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
        self._rule, self._formats, self._dtypes, self._params = rule, formats, stored_dtypes(formats), params
        takes = signature(rule)
        self._given = np.zeros((max(rows) + 1, scalars + 1))
        self._rows, self._n_given, self._n_scalars = np.asarray(rows, np.int64), scalars, scalars + len(takes.formed)
        self._sums: _Sums | None = None
        self.device, self._sizes = params[0].device, np.array([param.numel() for param in params], np.int64)
        self.addresses = self._addresses(streams)
        table_rows = self._rows
        if takes.summed is not None:  # each parameter has scalars of its own beside those that it is given
            table_rows = np.arange(len(params))
        self._chunks = Chunks(self._sizes, table_rows, self.addresses, self.device)
        self._scalars = Numbers(max(table_rows) + 1, self._n_scalars + 1, compute_dtype(formats), self.device)
        self._pieces, self._keys = self._chunks.pieces, None
        if not is_plain(formats):
            widths = self.addresses[:, len(self._dtypes)]
            self._pieces = Pieces.of(tuning.block_table(self._sizes, widths, table_rows), self.device)
            self._keys = Table((max(table_rows) + 1,), torch.int64, self.device)
            self._key_of_row = np.zeros(len(self._given), np.uint64)
        self._state: Sequence[Sequence[Tensor]] = ()
        self._measured: list[Tensor] = []
        self._kernel: library.Kernel | None = None
        self._bound: Callable[[], None] | None = None
        self._bound_to: Tensor | None = None

    def _addresses(self, streams: Sequence[Stream]) -> np.ndarray:
        """The table of addresses, without those of the state. See ``kernels`` and ``formats_kernel``."""
        grads = [0 if param.grad is None else param.grad.data_ptr() for param in self._params]
        columns = len(self._dtypes)
        if is_plain(self._formats):
            addresses = np.zeros((len(grads), columns), np.int64)
        else:
            has_scales = any(isinstance(format, Codec) for format in self._formats)
            addresses = np.zeros((len(grads), columns + 3), np.int64)
            widths = [rows_and_width(param.shape)[1] if has_scales else param.numel() for param in self._params]
            addresses[:, columns] = np.maximum(widths, 1)
            if streams:
                addresses[:, columns + 1 :] = streams
        addresses[:, 0], addresses[:, 1] = [param.data_ptr() for param in self._params], grads
        return addresses

    def compile(self, wants_norm: bool, measures: bool = False) -> None:
        with current(self.device):
            if self._kernel is None:
                self._kernel = self._checked(library.update, formats_library.update, self._n_scalars)
                constants(self.device)
                if signature(self._rule).summed is not None:
                    tables = self._chunks.table.tensor, self._scalars.tensor
                    kernel = self._checked(library.sums, formats_library.sums)
                    self._sums = _Sums(kernel, self._pieces, len(self._params), tables)
            if wants_norm:
                self._chunks.compile_norm(1, self._dtypes[1])

    def _checked(
        self, plain: Callable[..., library.Kernel], in_formats: Callable[..., library.Kernel], *arguments: Any
    ) -> library.Kernel:
        """A kernel of the rule for these formats, compiled; its arithmetic has been checked in one for dtypes."""
        kernel = plain(self._rule, *arguments, formats_library.as_dtypes(self._formats))
        library.check(self._rule, kernel, self.device)
        if not is_plain(self._formats):
            kernel = in_formats(self._rule, *arguments, self._formats)
            kernel.compile(self.device)
        return kernel

    def set_noise(self, row: int, key: int) -> None:
        self._key_of_row[row] = key

    def set_state(self, tensors: Sequence[Sequence[Tensor]]) -> None:
        self._state = tensors
        for row, state in zip(self.addresses, tensors, strict=True):
            row[2 : len(self._dtypes)] = [tensor.data_ptr() for tensor in state]

    def set_scalars(self, row: int, scale: float, scalars: Sequence[float | Tensor]) -> None:
        if len(scalars) != self._n_given:
            raise ValueError(f"the rule takes {self._n_given} scalars, got {len(scalars)}.")
        if self._sums is None:
            self._scalars.set(row, (scale, *scalars))
        else:
            self._given[row] = (scale, *scalars)

    def sums(self) -> Tensor:
        assert self._sums is not None
        self._scalars.set_columns(0, self._given[self._rows])
        with current(self.device):
            self._chunks.upload(is_capturing=False)
            self._scalars.upload(is_capturing=False)
            return self._sums.run()

    def set_formed(self, values: np.ndarray) -> None:
        self._scalars.set_columns(1 + self._n_given, values)

    def sum_of_squares(self) -> Tensor:
        return self._chunks.sum_of_squares()

    def written(self) -> np.ndarray:
        columns = [column for column in range(len(self._dtypes)) if column != 1]
        starts = self.addresses[:, columns]
        ends = starts + self._counts()[:, columns] * np.array([self._dtypes[column].itemsize for column in columns])
        spans = np.stack([starts.ravel(), ends.ravel()], axis=1)
        return spans[spans[:, 0] < spans[:, 1]]

    def _counts(self) -> np.ndarray:
        """How many elements each tensor has: a row a parameter, a column for each of ``stored_dtypes``."""
        counts = np.repeat(self._sizes[:, None], len(self._dtypes), axis=1)
        if scales := sum(isinstance(format, Codec) for format in self._formats):
            counts[:, -scales:] = [[scale_shape(param.shape).numel()] for param in self._params]
        return counts

    def run(self, decision: Decision | None, measures: bool) -> None:
        """Apply the rule to everything."""
        values = constants(self.device).values if decision is None else decision.values
        with current(self.device):
            if self._bound is None or self._bound_to is not values:
                self._bind(values)
            before = [param.clone() for param, _ in self._opened()] if measures else []
            if self._pieces.programs:
                is_recorded = is_capturing(self.device)
                self._chunks.upload(is_recorded)
                self._scalars.upload(is_recorded)
                if self._keys is not None:
                    self._keys.upload(self._key_of_row if self._sums is None else self._key_of_row[self._rows])
                if is_recorded:
                    keep(values, self._pieces, self._keys)
                assert self._bound is not None
                self._bound()
            if measures:
                self._measure(before)

    def _bind(self, values: Tensor) -> None:
        assert self._kernel is not None
        tables = [self._pieces.table, self._chunks.table.tensor, self._scalars.tensor, values]
        if self._keys is not None:
            tables.append(self._keys.tensor)
        self._bound = self._kernel.bind(self._pieces.programs, self.device, *tables)
        self._bound_to = values

    def _opened(self) -> list[tuple[Tensor, Sequence[Tensor]]]:
        """Each parameter and its state as the rule sees them."""
        if is_plain(self._formats):
            return [(param.detach(), state) for param, state in zip(self._params, self._state, strict=True)]
        pairs = zip(self._params, self._state, strict=True)
        opened = [Opened(self._formats, param.detach(), state) for param, state in pairs]
        return [(each.param, each.state) for each in opened]

    def _measure(self, before: Sequence[Tensor]) -> None:
        compute, positions = compute_dtype(self._formats), moments(self._rule)
        with torch.no_grad():
            self._measured = [
                measured_sums(old.to(compute), param.grad.to(compute), (new, *state), positions)
                for old, param, (new, state) in zip(before, self._params, self._opened(), strict=True)
                if param.grad is not None
            ]

    def measured(self) -> Tensor:
        return torch.stack(self._measured)


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Of all tensors, in float64, shape ()."""
    device, sums = tensors[0].device, []
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        members = [tensor for tensor in tensors if tensor.dtype == dtype]
        addresses = np.array([[tensor.data_ptr()] for tensor in members], np.int64)
        sizes = np.array([tensor.numel() for tensor in members], np.int64)
        chunks = Chunks(sizes, np.zeros_like(sizes), addresses, device)
        chunks.compile_norm(0, dtype)
        sums.append(chunks.sum_of_squares())
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()
