"""Updates the rows that a sparse gradient touches: sorts its entries, sums duplicates, applies the rule to each row.

The host waits for the device where it must know something: which rows are stale, for ``sparse="exact"``. A step with
``sparse="touched"`` only enqueues work. So rows are not counted: programs cover the entries, and those that are not the
first of their row have nothing to update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from descend.backends.cpu import threads
from descend.backends.cpu.launch import ScalarState
from descend.backends.eager import measured_sums
from descend.backends.opened import Opened
from descend.backends.triton import formats_library, library, rows_library, tuning
from descend.backends.triton.rows_library import Blocks, Gradient
from descend.backends.triton.tables import Numbers, constants, current, is_capturing, keep, uploaded
from descend.core.codecs import BLOCK, Codec, Formats, compute_dtype, element_dtype, is_plain
from descend.core.decision import Decision
from descend.core.measures import moments
from descend.core.noise import Stream, words


class TouchedRows:
    """See ``backend.Rows``.

    Args:
        rule: the function to apply.
        scalars: how many scalars the rule takes.
        formats: of the parameter, the gradient's values and the state.
        all_rows: whether untouched rows are updated too: the gradient is then made dense.
        param: the parameter.
        stream: where its noise comes from, if there is noise.
    """

    def __init__(
        self,
        rule: Any,
        scalars: int,
        formats: Formats,
        all_rows: bool,
        param: Tensor,
        stream: Stream | None = None,
    ) -> None:
        self._rule, self._n_scalars, self._formats, self._all_rows = rule, scalars, formats, all_rows
        self._stream, self._grad_dtype = stream or Stream(0, 0), element_dtype(formats[1])
        self._device, self._sizes, self._length = param.device, tuple(param.shape[:1]), math.prod(param.shape[1:])
        self._compute, self._are_aligned = compute_dtype(formats), are_aligned([param])
        self._scalars = Numbers(1, 1 + scalars, self._compute, self._device)
        self._buffers = {"in_range": torch.ones(1, dtype=torch.int8, device=self._device)}
        empty = [
            torch.empty(0, dtype=dtype, device=self._device) for dtype in (torch.int32, torch.int64, self._grad_dtype)
        ]
        self._nothing = self._entries_of(*empty)
        self._named = self._entries = self._nothing
        self._measured = self._nothing.carries

    def compile(self, wants_norm: bool, measures: bool = False) -> None:
        keys, interpreted = _key_dtype(self._sizes), library.interprets()
        gradient = Gradient(keys, self._grad_dtype, self._compute, True, self._blocks())
        kernels = [rows_library.keys(1, keys, interpreted), rows_library.carry(gradient, interpreted)]
        kernels += [rows_library.squares(gradient, interpreted), library.total(interpreted)] * wants_norm
        kernels += [rows_library.sums(gradient, True, interpreted)] * self._all_rows
        kernels += [rows_library.sums(gradient, False, interpreted)] * measures
        with current(self._device):
            kernel = self._update(gradient, self._are_aligned)
            rows_library.check(self._rule, kernel, self._n_scalars, self._formats, self._device)
            for kernel in kernels:
                kernel.compile(self._device)

    def _update(self, gradient: Gradient, are_aligned: bool) -> library.Kernel:
        return rows_library.update(self._rule, self._n_scalars, self._formats, gradient, are_aligned)

    def read(
        self, indices: Tensor, values: Tensor, sizes: tuple[int, ...], steps: Tensor | None, step: int
    ) -> int | None:
        self._sizes, self._length = sizes, math.prod(values.shape[1:])
        with current(self._device):
            keys, order = torch.sort(self._keys(indices), stable=True)
            if len(keys):
                _refuse_wrong_index(keys, order, indices, sizes, self._buffers["in_range"])
                if steps is not None:
                    total = math.prod(sizes)
                    late = int(torch.where(steps[keys].abs() == step, total, keys).min())
                    if late < total:
                        return late
            self._named = self._entries = self._carried(keys, order, values)
            if self._all_rows:
                self._entries = self._densified()
            # Compiled before anything moves, if this gradient needs another kernel than the parameter alone tells.
            self._update(self._entries.gradient, self._are_aligned).compile(self._device)
        return None

    def _keys(self, indices: Tensor) -> Tensor:
        """The number of the row of each entry; -1 if an index is out of range."""
        dimensions, count = indices.shape
        keys = torch.empty(count, dtype=_key_dtype(self._sizes), device=self._device)
        if count:
            kernel = rows_library.keys(dimensions, keys.dtype, library.interprets())
            in_range = self._buffer("in_range", 1, torch.int8)
            kernel.bind(-(-count // tuning.ENTRIES), self._device, indices, keys, in_range, self._sizes, count)()
        return keys

    def _blocks(self) -> Blocks:
        if any(isinstance(format, Codec) for format in self._formats):
            return Blocks.of(self._length, self._compute, BLOCK)  # with one scale
        return Blocks.of(self._length, self._compute)

    def _entries_of(self, keys: Tensor, order: Tensor, values: Tensor) -> _Entries:
        gradient = Gradient(keys.dtype, self._grad_dtype, self._compute, are_aligned([values]), self._blocks())
        carries = self._buffer("carries", gradient.blocks.numbers(len(keys)), self._compute)
        return _Entries(keys, order, values, carries, gradient)

    def _carried(self, keys: Tensor, order: Tensor, values: Tensor) -> _Entries:
        """The entries; what runs have in tiles after their first is summed."""
        entries = self._entries_of(keys, order, values)
        if entries.programs:
            kernel = rows_library.carry(entries.gradient, library.interprets())
            kernel.bind(entries.programs, self._device, *entries.arguments())()
        return entries

    def _densified(self) -> _Entries:
        """The gradients of all rows, zero for those that have none: every row has one entry."""
        total = math.prod(self._sizes)
        dense = self._summed(total, by_key=True)
        keys = torch.arange(total, dtype=self._named.keys.dtype, device=self._device)
        return self._entries_of(keys, keys.long(), dense)

    def _summed(self, rows: int, by_key: bool) -> Tensor:
        """The summed gradients among ``rows`` rows of zeros, see ``rows_kernel.sums``."""
        sums = torch.zeros(rows, self._length, dtype=self._grad_dtype, device=self._device)
        if self._entries.programs:
            kernel = rows_library.sums(self._entries.gradient, by_key, library.interprets())
            kernel.bind(self._entries.programs, self._device, sums, *self._entries.arguments())()
        return sums

    def _buffer(self, name: str, count: int, dtype: torch.dtype) -> Tensor:
        """Scratch memory of at least ``count`` numbers, which is kept and grows. ``self._device`` is current."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < count:
            buffer = self._buffers[name] = torch.empty(count + count // 4 + 1, dtype=dtype, device=self._device)
        if is_capturing(self._device):
            keep(buffer)  # later steps may need another one, replays still use this
        return buffer

    @property
    def rows(self) -> np.ndarray:
        rows: np.ndarray = self._named.keys[self._named.are_heads()].cpu().numpy().astype(np.int64)
        return rows

    @property
    def count(self) -> Tensor:
        return self._named.are_heads().sum()

    def sum_of_squares(self) -> Tensor:
        entries, interpreted = self._entries, library.interprets()
        with current(self._device):
            squares = self._buffer("squares", entries.programs, torch.float64)
            result = self._buffer("result", 0, torch.float64)[0]
            if entries.programs:
                kernel = rows_library.squares(entries.gradient, interpreted)
                kernel.bind(entries.programs, self._device, squares, *entries.arguments())()
            library.total(interpreted).bind(1, self._device, squares, entries.programs, result)()
        return result

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
        tensors = tuple(tensor.detach() for tensor in (param, *state))
        with current(self._device), torch.no_grad():
            self._entries = self._entries.apart_from(tensors)
            before = self._at_heads(tensors)[0] if measures else None
            if self._entries.programs:
                self._scalars.set(0, (scale, *scalars))
                self._scalars.upload(is_capturing(self._device))
                values = constants(self._device).values if decision is None else decision.values
                steps, step = (values, 0) if mark is None else mark
                self._are_aligned = are_aligned(tensors)
                kernel = self._update(self._entries.gradient, self._are_aligned)
                noise = () if is_plain(self._formats) else (self._stream.place, *words(noise_key, self._stream.number))
                kernel.bind(
                    self._entries.programs, self._device, self._as_read(tensors), self._scalars.tensor, values, steps,
                    step, *noise, *self._entries.arguments(),
                )()  # fmt: skip
            if before is not None:
                grad = self._summed(len(before), by_key=False).to(self._compute)
                self._measured = measured_sums(before, grad, self._at_heads(tensors), moments(self._rule))[None]
        threads.CallSequence(counters.add_one_calls()).run()

    def _as_read(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The parameter and its state in the dtypes that kernels read."""
        if is_plain(self._formats):
            return tensors
        dtypes = formats_library.Stored.of(self._formats).without_gradient().dtypes
        return tuple(tensor.view(dtype) for tensor, dtype in zip(tensors, dtypes, strict=True))

    def _at_heads(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The rows of the parameter and its state at the heads; zeros where a sorted entry is no head."""
        heads, keys = self._entries.are_heads(), self._entries.keys.clamp(min=0).long()
        param, *state = (tensor.reshape(math.prod(self._sizes), -1)[keys] for tensor in tensors)
        if not is_plain(self._formats):
            opened = Opened(self._formats, param, state)
            param, state = opened.param, opened.state
        return [torch.where(heads[:, None], rows, 0).to(self._compute) for rows in (param, *state)]

    def measured(self) -> Tensor:
        return self._measured

    def release(self) -> None:
        self._named = self._entries = self._nothing


class _Entries(NamedTuple):
    """The sorted entries of a gradient, see ``rows_kernel``."""

    keys: Tensor
    order: Tensor
    values: Tensor
    carries: Tensor
    gradient: Gradient

    @property
    def programs(self) -> int:
        """How many programs take all of them."""
        return self.gradient.blocks.programs(len(self.keys))

    def arguments(self) -> tuple[Tensor | int, ...]:
        """What kernels take of it."""
        return self.keys, self.order, self.values, self.carries, len(self.keys)

    def are_heads(self) -> Tensor:
        """Which are the first of their row."""
        heads = self.keys >= 0
        heads[1:] &= self.keys[1:] != self.keys[:-1]
        return heads

    def apart_from(self, tensors: Sequence[Tensor]) -> _Entries:
        """The same, with a copy of the values if they may share memory with what is about to be written."""
        written = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        is_shared = self.values.untyped_storage().data_ptr() in written
        return self._replace(values=self.values.clone()) if is_shared else self


class StaleRows:
    """Brings rows up to date that have missed steps, see ``backend.CatchUp``.

    Args:
        with_state: the rule for rows with state.
        without_state: the rule for rows whose state is zero; it takes one scalar.
        scalars: how many scalars ``with_state`` takes.
        dtypes: of the parameter and the state tensors.
        param: the parameter.
    """

    def __init__(
        self, with_state: Any, without_state: Any, scalars: int, dtypes: tuple[torch.dtype, ...], param: Tensor
    ) -> None:
        self._with_state, self._without_state = with_state, without_state
        self._n_scalars, self._dtypes = scalars, dtypes
        self._device, self._compute = param.device, compute_dtype(dtypes)
        self._blocks = Blocks.of(math.prod(param.shape[1:]), self._compute)
        self._which: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        (stale,) = torch.where(self._found != 0)
        return stale + self._first if self._which is None else self._which[stale]

    def compile(self) -> None:
        interpreted = library.interprets()
        with current(self._device):
            param, *state = self._dtypes
            for named in (False, True):
                for has_state, read in ((True, (param, param, *state)), (False, (param, param))):
                    rule, scalars = self._rule_for(has_state)
                    kernel = self._kernel(has_state, 1, named, are_aligned=True)
                    rows_library.check(rule, kernel, scalars, read, self._device)
                rows_library.find(named, interpreted).compile(self._device)
                rows_library.mark(named, interpreted).compile(self._device)

    def _kernel(self, has_state: bool, rounds: int, named: bool, are_aligned: bool) -> library.Kernel:
        rule, scalars = self._rule_for(has_state)
        return rows_library.catch_up(rule, scalars, self._dtypes, self._blocks, are_aligned, named, has_state, rounds)

    def _rule_for(self, has_state: bool) -> tuple[Any, int]:
        """A rule, and how many scalars it takes."""
        return (self._with_state, self._n_scalars) if has_state else (self._without_state, 1)

    def find(
        self, which: Tensor | range, sizes: tuple[int, ...], steps: Tensor, now: int, start: int
    ) -> tuple[np.ndarray, bool, bool] | None:
        self._steps, self._now = steps, now
        self._first, self._which = 0, None
        with current(self._device):
            if isinstance(which, range):
                self._first, count = which.start, len(which)
            else:
                self._which, count = torch.sort(which.reshape(-1).to(self._device, torch.int64)).values, which.numel()
            self._found = torch.empty(count, dtype=torch.int32, device=self._device)
            seen = torch.zeros(3 + max(now - start, 0), dtype=torch.int8, device=self._device)
            if count:
                named = self._which is not None
                arguments = self._named(), steps, self._found, seen, count, self._first, len(steps), now, start
                kernel = rows_library.find(named, library.interprets())
                kernel.bind(-(-count // tuning.ENTRIES), self._device, *arguments)()
            flags = seen.cpu().numpy()  # waits for the device
            if flags[2]:
                return None
            self._places = torch.cumsum(seen[3:], 0) - 1
        return start + np.flatnonzero(flags[3:]), bool(flags[0]), bool(flags[1])

    def run(
        self,
        param: Tensor,
        state: Sequence[Tensor],
        scalars: np.ndarray | None,
        factors: np.ndarray | None,
        mark: bool,
    ) -> None:
        with current(self._device):
            if scalars is not None:
                self._apply(True, scalars, param, *state)
            if factors is not None:
                self._apply(False, factors[None, :, None], param)
            if mark and len(self._found):
                kernel = rows_library.mark(self._which is not None, library.interprets())
                arguments = self._named(), self._found, self._steps, len(self._found), self._first, self._now
                kernel.bind(-(-len(self._found) // tuning.ENTRIES), self._device, *arguments)()

    def _apply(self, has_state: bool, scalars: np.ndarray, *written: Tensor) -> None:
        """Apply one of the two rules; ``scalars`` has shape (rounds, steps, scalars)."""
        tensors = tuple(tensor.detach() for tensor in written)
        kernel = self._kernel(has_state, len(scalars), self._which is not None, are_aligned(tensors))
        table = uploaded(torch.from_numpy(scalars).to(self._compute).contiguous().numpy(), self._device)
        count, programs = len(self._found), self._blocks.programs(len(self._found))
        if programs:
            arguments = self._named(), self._found, self._places, tensors, table, count, self._first, scalars.shape[1]
            kernel.bind(programs, self._device, *arguments)()

    def _named(self) -> Tensor:
        """The rows; where they are a range, kernels do not read them."""
        return self._found if self._which is None else self._which


def are_aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether all begin at multiples of sixteen bytes."""
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def _key_dtype(sizes: tuple[int, ...]) -> torch.dtype:
    """The narrowest that holds the number of each row: sorting takes time for every bit."""
    return torch.int32 if math.prod(sizes) < 2**31 else torch.int64


def _refuse_wrong_index(keys: Tensor, order: Tensor, indices: Tensor, sizes: tuple[int, ...], in_range: Tensor) -> None:
    """Raise ``IndexError`` if an index is out of range; a device fails later, so that the host need not wait for it.

    ``in_range`` is 0 if one ever was: a device that has failed takes no more steps.
    """
    what = "is out of range for a table of"
    if not _is_on_host(keys):
        torch._assert_async(in_range.view(torch.bool), f"an index of a sparse gradient {what} {sizes} rows")
    elif keys[0] < 0:
        raise IndexError(f"index {tuple(indices[:, order[0]].tolist())} {what} {sizes} rows")


def _is_on_host(tensor: Tensor) -> bool:
    """Whether Triton's interpreter runs."""
    return tensor.is_cpu
