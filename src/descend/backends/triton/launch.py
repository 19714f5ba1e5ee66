"""One rule on all dense parameters of equal dtypes: its tables on the device, and its kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descend.backends.eager import measured_sums
from descend.backends.triton import library, tuning
from descend.backends.triton.tables import Numbers, Table, constants, current, is_capturing, keep, uploaded
from descend.core.decision import Decision
from descend.core.measures import moments
from descend.core.signature import signature


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
        chunks = tuning.chunk_table(sizes, np.asarray(rows, np.int64))
        self.count, self.of_tensor = len(chunks), chunks[:, 0]
        self.chunks = uploaded(chunks, device)
        self.table = Table(addresses.shape, torch.int64, device)
        self._norm: _Norm | None = None

    def upload(self, is_capturing: bool) -> None:
        """Bring the addresses up to date. Chunks never change."""
        self.table.upload(self.addresses, is_capturing)
        if is_capturing:
            keep(self.chunks, self._norm)

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
        device, count, interpreted = chunks.device, chunks.count, library.interprets()
        self._sums = torch.empty(max(count, 1), dtype=torch.float64, device=device)
        self._result = torch.empty((), dtype=torch.float64, device=device)
        columns = chunks.addresses.shape[1]
        squares, total = library.sums_of_squares(dtype, column, columns, interpreted), library.total(interpreted)
        self._launches = [total.bind(1, device, self._sums, count, self._result)]
        if count:
            self._launches.insert(0, squares.bind(count, device, chunks.chunks, chunks.table.tensor, self._sums))

    def run(self) -> Tensor:
        for launch in self._launches:
            launch()
        return self._result


class _Sums:
    """The two launches that sum what the part of a rule returns: over each chunk, then over the chunks of a tensor."""

    def __init__(
        self, chunks: Chunks, rule: Any, dtypes: tuple[torch.dtype, ...], sizes: np.ndarray, scalars: Numbers
    ) -> None:
        device, width, tensors = chunks.device, signature(rule).sums, len(sizes)
        kernel, totals = library.sums(rule, dtypes), library.totals(width, library.interprets())
        library.check(rule, kernel, device)
        sums = torch.empty((max(chunks.count, 1), width), dtype=torch.float64, device=device)
        self._result = torch.zeros((tensors, width), dtype=torch.float64, device=device)
        of_tensor = np.bincount(chunks.of_tensor, minlength=tensors)
        spans = uploaded(np.stack([np.cumsum(of_tensor) - of_tensor, of_tensor], axis=1).astype(np.int64), device)
        self._launches = []
        if chunks.count:
            tables = chunks.chunks, chunks.table.tensor, scalars.tensor
            self._launches = [
                kernel.bind(chunks.count, device, *tables, sums),
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
        dtypes: of the parameter, the gradient and the state tensors.
        params: the parameters, all on one device; gradients in their layout.
        rows: for each parameter, its row in the scalars table.
    """

    def __init__(
        self,
        rule: Any,
        scalars: int,
        dtypes: tuple[torch.dtype, ...],
        params: Sequence[Tensor],
        rows: Sequence[int] | np.ndarray,
    ) -> None:
        self._rule, self._dtypes, self._params = rule, dtypes, params
        takes = signature(rule)
        self._given = np.zeros((max(rows) + 1, scalars + 1))
        self._rows, self._n_given, self._n_scalars = np.asarray(rows), scalars, scalars + len(takes.formed)
        self._sums: _Sums | None = None
        self.device = params[0].device
        self.addresses = np.zeros((len(params), len(dtypes)), np.int64)
        self.addresses[:, 0] = [param.data_ptr() for param in params]
        self.addresses[:, 1] = [0 if param.grad is None else param.grad.data_ptr() for param in params]
        self._sizes = np.array([param.numel() for param in params], np.int64)
        if takes.summed is not None:  # each parameter has scalars of its own beside those that it is given
            rows = np.arange(len(params))
        self._chunks = Chunks(self._sizes, rows, self.addresses, self.device)
        compute = library.compute_dtype(dtypes)
        self._scalars = Numbers(max(rows) + 1, self._n_scalars + 1, compute, self.device)
        self._state: Sequence[Sequence[Tensor]] = ()
        self._measured: list[Tensor] = []
        self._kernel: library.Kernel | None = None
        self._bound: Callable[[], None] | None = None
        self._bound_to: Tensor | None = None

    def compile(self, wants_norm: bool, measures: bool = False) -> None:
        with current(self.device):
            if self._kernel is None:
                self._kernel = library.update(self._rule, self._n_scalars, self._dtypes)
                library.check(self._rule, self._kernel, self.device)
                constants(self.device)
                if signature(self._rule).summed is not None:
                    self._sums = _Sums(self._chunks, self._rule, self._dtypes, self._sizes, self._scalars)
            if wants_norm:
                self._chunks.compile_norm(1, self._dtypes[1])

    def set_noise(self, row: int, key: int) -> None:
        raise NotImplementedError

    def set_state(self, tensors: Sequence[Sequence[Tensor]]) -> None:
        self._state = tensors
        for row, state in zip(self.addresses, tensors, strict=True):
            row[2:] = [tensor.data_ptr() for tensor in state]

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
        ends = starts + self._sizes[:, None] * np.array([self._dtypes[column].itemsize for column in columns])
        spans = np.stack([starts.ravel(), ends.ravel()], axis=1)
        return spans[spans[:, 0] < spans[:, 1]]

    def run(self, decision: Decision | None, measures: bool) -> None:
        """Apply the rule to everything."""
        values = constants(self.device).values if decision is None else decision.values
        with current(self.device):
            if self._bound is None or self._bound_to is not values:
                self._bind(values)
            before = [param.detach().clone() for param in self._params] if measures else []
            if self._chunks.count:
                is_recorded = is_capturing(self.device)
                self._chunks.upload(is_recorded)
                self._scalars.upload(is_recorded)
                if is_recorded:
                    keep(values)
                assert self._bound is not None
                self._bound()
            if measures:
                self._measure(before)

    def _bind(self, values: Tensor) -> None:
        assert self._kernel is not None
        tables = self._chunks.chunks, self._chunks.table.tensor, self._scalars.tensor, values
        self._bound = self._kernel.bind(self._chunks.count, self.device, *tables)
        self._bound_to = values

    def _measure(self, before: Sequence[Tensor]) -> None:
        compute, positions = library.compute_dtype(self._dtypes), moments(self._rule)
        with torch.no_grad():
            self._measured = [
                measured_sums(old.to(compute), grad.to(compute), (param, *state), positions)
                for old, param, state in zip(before, self._params, self._state, strict=True)
                if (grad := param.grad) is not None
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
