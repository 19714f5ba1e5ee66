"""Tables on the device: addresses, chunks, scalars. They are uploaded when they have changed, and nothing waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from descend.backends.triton import library, tuning
from descend.core.decision import Decision

_captured: list[Any] = []
_NOTHING = nullcontext()


def keep(*objects: Any) -> None:
    """Keep what a captured launch reads for good: a CUDA graph holds addresses only, and nobody says when it ends."""
    _captured.append(objects)


def current(device: torch.device) -> Any:
    """A context in which a device is the current one."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


def uploaded(content: np.ndarray, device: torch.device) -> Tensor:
    """A table on the device that never changes."""
    table = torch.from_numpy(content)
    if device.type == "cpu" or not content.size:
        return table.to(device)
    with current(device):
        # torch keeps pinned memory until the copy is over; a graph would copy from it again.
        pinned = table.pin_memory()
        if is_capturing(device):
            keep(pinned)
        return pinned.to(device, non_blocking=True)


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of the current device records a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Table:
    """A table on the device.

    An upload is one asynchronous copy from pinned memory. That memory is used again when its last copy is over; until
    then another piece is taken. A copy that a CUDA graph records reads its memory at each replay, so it has its own.

    Args:
        shape: of the table.
        dtype: its dtype, of 4 or 8 bytes.
        device: where it lies.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        self._is_on_host = device.type == "cpu"
        self._bits = np.dtype(f"i{dtype.itemsize}")
        self._uploaded: np.ndarray | None = None
        self._pieces: deque[_Piece] = deque()
        self._spare: _Piece | None = None
        self._in_graphs: list[_Piece] = []

    def upload(self, content: np.ndarray, is_capturing: bool = False) -> bool:
        """Make the table equal to ``content``, contiguous and of its dtype. Return whether something was copied.

        A graph uploads all that it reads, because steps outside of it upload other content in between; and they upload
        theirs, because a replay may have come in between.
        """
        content = content.view(self._bits)
        if not (is_capturing or self._in_graphs) and self._uploaded is not None:
            if np.array_equal(content, self._uploaded):
                return False
            self._uploaded[:] = content
        else:
            self._uploaded = content.copy()
        if self._is_on_host:
            self.tensor.view(_INTEGERS[self._bits.itemsize]).copy_(torch.from_numpy(content))
            return True
        piece = self._for_graph(content) if is_capturing else self._free_piece()
        piece.array[:] = content
        self.tensor.copy_(piece.tensor, non_blocking=True)
        if is_capturing:
            keep(self, piece)
        else:
            piece.event.record()
            self._pieces.append(piece)
        return True

    def _free_piece(self) -> _Piece:
        """Pinned memory whose last copy is over. Copies end in their order, so only the oldest is asked."""
        if self._spare is None:
            self._spare = _Piece(self.tensor)
        if self._pieces and self._pieces[0].event.query():
            return self._pieces.popleft()
        return _Piece(self.tensor)

    def _for_graph(self, content: np.ndarray) -> _Piece:
        """Pinned memory that keeps ``content``. No capture should allocate any: it is made before, or shared."""
        for piece in self._in_graphs:
            if np.array_equal(piece.array, content):
                return piece
        piece, self._spare = self._spare or _Piece(self.tensor), None
        self._in_graphs.append(piece)
        return piece


_INTEGERS = {4: torch.int32, 8: torch.int64}


class _Piece:
    """Pinned memory as large as a table, and the event that ends its last copy."""

    def __init__(self, like: Tensor) -> None:
        self.tensor = torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=True)
        self.array: np.ndarray = self.tensor.view(_INTEGERS[like.itemsize]).numpy()
        self.event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]


class Numbers:
    """A table of floating-point numbers, of which some may be on the device already.

    Args:
        rows: how many rows it has.
        columns: how many columns.
        dtype: float32 or float64.
        device: where it lies.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self._table = Table((rows, columns), dtype, device)
        self._host = np.zeros((rows, columns), {4: np.float32, 8: np.float64}[dtype.itemsize])
        self._on_device: dict[int, Tensor] = {}
        self._dtype, self._columns = dtype, columns
        self._scatter: Scatter | None = None
        self._places: list[int] = []
        self._given: Tensor | None = None

    @property
    def tensor(self) -> Tensor:
        return self._table.tensor

    def set(self, row: int, numbers: Sequence[float | Tensor]) -> None:
        """Set a row."""
        if not self._on_device and any(isinstance(number, Tensor) for number in numbers):
            library.scalar_state(self._dtype, library.interprets()).compile(self.tensor.device)  # not while a step runs
        first = row * self._columns
        for place, number in enumerate(numbers, first):
            if isinstance(number, Tensor):
                self._on_device[place] = number
            elif self._on_device:
                self._on_device.pop(place, None)
        self._host[row] = [0.0 if isinstance(number, Tensor) else number for number in numbers]

    def set_columns(self, first: int, values: np.ndarray) -> None:
        """Set columns from ``first`` on, of all rows. They are on the host."""
        self._host[:, first : first + values.shape[1]] = values

    def upload(self, is_capturing: bool) -> None:
        """Bring the device up to date."""
        self._table.upload(self._host, is_capturing)
        if not self._on_device:
            return
        places, tensors = list(self._on_device), list(self._on_device.values())
        if places != self._places or self._given is None:
            self._places = places
            self._given = torch.empty(len(places), dtype=torch.float64, device=self.tensor.device)
            start, size = self.tensor.data_ptr(), self.tensor.itemsize
            addresses = np.array([start + size * place for place in places], np.int64)
            self._scatter = Scatter(addresses, np.arange(len(places)), self._dtype, self.tensor.device)
        assert self._scatter is not None
        with torch.no_grad():
            torch.stack(tensors, out=self._given)
        self._scatter.run(self._given, constants(self.tensor.device).values, is_capturing)


class Scatter:
    """Writes numbers to addresses on the device, in one launch.

    Args:
        addresses: to write to.
        places: for each address, which number is written there.
        dtype: of what lies at the addresses.
        device: where.
    """

    def __init__(self, addresses: np.ndarray, places: np.ndarray, dtype: torch.dtype, device: torch.device) -> None:
        self._table = uploaded(np.stack([addresses, places]).astype(np.int64), device)
        self._kernel = library.scalar_state(dtype, library.interprets())
        self._kernel.compile(device)
        self._count, self._device = len(addresses), device
        self._launch: Any = None
        self._arguments: tuple[Tensor, ...] = ()

    def run(self, values: Tensor, decision: Tensor, is_capturing: bool) -> None:
        """Write ``values`` (float64), unless ``decision`` leaves the step out."""
        if is_capturing:
            keep(self._table, values, decision)
        if self._launch is None or self._arguments[0] is not values or self._arguments[1] is not decision:
            self._arguments = values, decision
            addresses, places = self._table
            programs = -(-self._count // tuning.THREADS)
            arguments = addresses, places, values, decision, self._count
            self._launch = self._kernel.bind(programs, self._device, *arguments)
        self._launch()


class Constants(NamedTuple):
    """Numbers on a device that are never written.

    Attributes:
        values: of a decision that changes nothing.
        one: shape ().
        zero: shape ().
    """

    values: Tensor
    one: Tensor
    zero: Tensor


_version = attrgetter("_version")
_constants: dict[torch.device, Constants] = {}


def constants(device: torch.device) -> Constants:
    """The constants of a device."""
    if device not in _constants:
        with torch.inference_mode(False):
            ones, zeros = (make(4, dtype=torch.float64, device=device) for make in (torch.ones, torch.zeros))
        _constants[device] = Constants(ones, ones[0], zeros[0])
    return _constants[device]


class DeviceScalarState:
    """0-dim state tensors of many parameters on a device, see ``backend.DeviceScalarState``.

    Their version counters show when somebody else has written one.

    Args:
        tensors: for each parameter its scalar state, as many each.
        rows: for each parameter, the row of values that it is given.
    """

    def __init__(self, tensors: Sequence[Sequence[Tensor]], rows: Sequence[int] | np.ndarray) -> None:
        self._tensors = [tensor for each in tensors for tensor in each]
        self._parts: list[Scatter] = []
        if self._tensors:
            columns, device = len(tensors[0]), self._tensors[0].device
            self._numbers = Numbers(max(rows) + 1, columns, torch.float64, device)
            places = (np.asarray(rows, np.int64)[:, None] * columns + np.arange(columns)).ravel()
            for dtype in dict.fromkeys(tensor.dtype for tensor in self._tensors):
                which = [i for i, tensor in enumerate(self._tensors) if tensor.dtype == dtype]
                addresses = np.array([self._tensors[i].data_ptr() for i in which], np.int64)
                self._parts.append(Scatter(addresses, places[which], dtype, device))
        self._watched = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._versions = self._sum_of_versions()

    def is_unchanged(self) -> bool:
        return self._versions == self._sum_of_versions()

    def write(self, values: Sequence[Sequence[Any]], decision: Decision | None) -> None:
        if not self._parts:
            return
        device = self._tensors[0].device
        with current(device):
            is_recorded = is_capturing(device)
            for row, numbers in enumerate(values):
                self._numbers.set(row, numbers)
            self._numbers.upload(is_recorded)
            taken = constants(device).values if decision is None else decision.values
            for part in self._parts:
                part.run(self._numbers.tensor, taken, is_recorded)

    def _sum_of_versions(self) -> int:
        """No version ever sinks, so the sum stays if all of them do."""
        return sum(map(_version, self._watched))
