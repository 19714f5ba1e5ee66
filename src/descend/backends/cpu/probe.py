"""Proves that tables of addresses still describe the tensors they were made from.

Users swap a parameter's storage, replace gradients and transpose things in place; every address a kernel is given
must be true at that moment. Asking torch from Python takes about a microsecond a tensor; here one native call asks the
same questions through torch's C interface (the ``aoti_torch_*`` shims) and two C++ functions, at a few nanoseconds
each. For every parameter and its gradient it compares the address and a hash of dtype, device, layout, sign bit, sizes
and strides with what was recorded. A gradient that merely moved is no change: its new address is written into the
table, unless it now overlaps memory that the step writes.

The native probe reads the ``at::Tensor`` inside each Python object, and owns none of them: it follows
``torch.utils.swap_tensors`` and does not stand in its way. The C++ names and the place of the ``at::Tensor`` are not a
stable interface. They are looked up at first use, and the native probe then has to give the answers of the one in
Python; where it does not, or on other systems than Linux, ``PythonProbe`` does all the work.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from descend.backends.cpu import library, object_files, threads

_SHIMS = (
    "is_defined",
    "get_dtype",
    "get_device_type",
    "get_layout",
    "get_dim",
    "get_sizes",
    "get_strides",
    "get_data_ptr",
)
_IS_NEG = "_ZN2at6native6is_negERKNS_6TensorE"  # bool at::native::is_neg(const Tensor&)
_GRAD = "_ZNK3c1010TensorImpl4gradEv"  # const Tensor& c10::TensorImpl::grad() const
_NO_TABLE, _STATE = 0, -1
_SHARED_FROM = 256  # tensors; below, waking a second thread costs more than it saves


class Cell(NamedTuple):
    """Where a gradient's address is kept: ``table[row, 1]``."""

    table: np.ndarray
    row: int


class _Torch(NamedTuple):
    """What the native probe knows of this torch.

    Attributes:
        functions: their addresses, in the order of ``_SHIMS``, then ``_IS_NEG`` and ``_GRAD``.
        tensor: where a Python tensor keeps its ``at::Tensor``, in bytes from its address.
        kind: where an object keeps its class.
    """

    functions: np.ndarray
    tensor: int
    kind: int


class NativeProbe:
    """Watches parameters, their gradients and state tensors.

    Args:
        found: what is known of this torch.
        params: the parameters to watch.
        cells: for each parameter, where its gradient's address is kept; None if no kernel reads it.
        state: state tensors, watched when ``holds(state=True)`` is asked.
        written: sorted, disjoint intervals of the addresses that the step writes, shape (n, 2).
    """

    def __init__(
        self,
        found: _Torch,
        params: Sequence[Tensor],
        cells: Sequence[Cell | None],
        state: Sequence[Tensor],
        written: np.ndarray,
    ) -> None:
        tensors = [*params, *state]
        self._params = len(params)
        self._rows = np.zeros((len(tensors), 7), np.int64)
        self._rows[:, 0] = [id(tensor) + found.tensor for tensor in tensors]
        self._rows[:, 6] = _NO_TABLE
        self._rows[len(params) :, 6] = _STATE
        for row, param, cell in zip(self._rows, params, cells, strict=False):
            if cell is not None:
                row[5] = param.numel() * (param.grad.itemsize if param.grad is not None else 0)
                row[6] = cell.table.ctypes.data + cell.table.strides[0] * cell.row + 8
        intervals = np.ascontiguousarray(written.T)
        starts = intervals.ctypes.data
        functions, rows, ends = found.functions.ctypes.data, self._rows.ctypes.data, starts + 8 * len(written)
        kind = (found.kind - found.tensor) // 8
        self._call = array("q", [functions, 1, rows, 0, starts, ends, len(written), kind, 0, 1])
        self._alive = tensors, cells, intervals, found
        self._kernel, self._address = library.probe(), self._call.buffer_info()[0]
        self._run_alone = object_files.locked(self._kernel)
        self.holds(state=True)
        self._call[1] = 0

    def holds(self, state: bool) -> bool:
        """Whether all is as recorded; gradients that moved are followed. With ``state``, state tensors too."""
        call = self._call
        call[3], call[8], call[9] = len(self._rows) if state else self._params, 0, 1
        # The interpreter lock is kept: nobody replaces a gradient while it is being looked at.
        if call[3] < _SHARED_FROM:
            self._run_alone(self._address)
        else:
            threads.run_locked(self._kernel, self._address)
        return bool(call[9])


class PythonProbe:
    """The same questions, asked in Python."""

    def __init__(
        self, params: Sequence[Tensor], cells: Sequence[Cell | None], state: Sequence[Tensor], written: np.ndarray
    ) -> None:
        self._params, self._cells, self._state, self._written = params, cells, state, written
        self._seen = [_layout(param) for param in params]
        self._seen_grads = [_layout(param.grad) for param in params]
        self._seen_state = [_layout(tensor) for tensor in state]

    def holds(self, state: bool) -> bool:
        """Whether all is as recorded; gradients that moved are followed. With ``state``, state tensors too."""
        if self._seen != [_layout(param) for param in self._params]:
            return False
        if state and self._seen_state != [_layout(tensor) for tensor in self._state]:
            return False
        found = [_layout(param.grad) for param in self._params]
        moved = [i for i, (seen, grad) in enumerate(zip(self._seen_grads, found, strict=True)) if seen != grad]
        if any(self._seen_grads[i][:-1] != found[i][:-1] for i in moved):
            return False
        starts = np.array([found[i][-1] for i in moved], np.int64)
        if not starts.all() or self._meets_written(starts, moved):
            return False
        for i in moved:
            if (cell := self._cells[i]) is not None:
                cell.table[cell.row, 1] = found[i][-1]
        self._seen_grads = found
        return True

    def _meets_written(self, starts: np.ndarray, moved: list[int]) -> bool:
        """Whether one of the gradients that moved overlaps memory that the step writes."""
        grads = [self._params[i].grad for i in moved]
        ends = starts + np.array([grad.nbytes for grad in grads if grad is not None], np.int64)
        first = np.searchsorted(self._written[:, 1], starts, side="right")  # the first interval that ends behind it
        near = first < len(self._written)
        return bool((self._written[first[near], 0] < ends[near]).any())


def _layout(tensor: Tensor | None) -> tuple[Any, ...]:
    """All that a table of addresses relies on; the address comes last."""
    if tensor is None:
        return (None,)
    device = tensor.is_cpu or tensor.device
    if tensor.layout != torch.strided:
        return (tensor.layout, tensor.dtype, device, None)  # what it holds is read at every step
    address = tensor.data_ptr() if tensor.is_cpu and _is_plain(tensor) else None
    return (type(tensor), tensor.dtype, device, tensor.is_neg(), tensor.shape, tensor.stride(), address)


def make_probe(
    params: Sequence[Tensor], cells: Sequence[Cell | None], state: Sequence[Tensor], written: np.ndarray
) -> NativeProbe | PythonProbe:
    """The fastest probe for these tensors on this torch."""
    if all(map(_is_plain, params)) and (found := _native()) is not None:
        return NativeProbe(found, params, cells, state, written)
    return PythonProbe(params, cells, state, written)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter)  # others no kernel takes; some have no address


@cache
def _native() -> _Torch | None:
    """What the native probe needs; None where torch does not have it, or where its answers would be other ones."""
    try:
        found = _look_up()
    except (OSError, AttributeError, ValueError):  # not Linux, or another torch
        return None
    with torch.inference_mode(False), torch.no_grad():
        return found if _answers_as_python(found) else None


def _look_up() -> _Torch:
    folder = Path(torch.__file__).parent / "lib"
    torch_cpu, c10 = (ctypes.CDLL(str(folder / name)) for name in ("libtorch_cpu.so", "libc10.so"))
    functions = [getattr(torch_cpu, f"aoti_torch_{name}") for name in _SHIMS]
    functions += [getattr(torch_cpu, _IS_NEG), getattr(c10, _GRAD)]
    addresses = np.array([ctypes.cast(f, ctypes.c_void_p).value for f in functions], np.int64)
    tensor = torch.empty(0, device="cpu")
    words = (ctypes.c_int64 * (torch._C.TensorBase.__basicsize__ // 8)).from_address(id(tensor))
    header = object.__basicsize__ // 8
    # An at::Tensor is a pointer to its TensorImpl.
    return _Torch(addresses, 8 * words[:].index(tensor._cdata, header), 8 * words[:header].index(id(Tensor)))


def _answers_as_python(found: _Torch) -> bool:
    """Whether both probes notice the same edits, and follow the same gradients."""
    param, state = (torch.zeros(2, 2, device="cpu", dtype=torch.float32) for _ in range(2))
    param.grad = torch.zeros_like(param)
    written = np.array([[tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes] for tensor in (param, state)])
    written.sort(axis=0)
    tables = np.zeros((2, 1, 2), np.int64)
    native = NativeProbe(found, [param], [Cell(tables[0], 0)], [state], written)
    python = PythonProbe([param], [Cell(tables[1], 0)], [state], written)
    for _ in _edits(param, state):
        holds = native.holds(state=True)
        if holds != python.holds(state=True) or (holds and tables[0, 0, 1] != tables[1, 0, 1]):
            return False
    return True


def _edits(param: Tensor, state: Tensor) -> Iterator[None]:
    """Make one edit after the other, undo it, and at last leave everything as it was."""
    wide, grad = torch.zeros(2, 4, device="cpu", dtype=torch.float32), param.grad
    other = wide[:, :2].clone()
    assert grad is not None
    for tensor in (param, grad, state):
        before = tensor.data
        for edited in (other, other.double(), other.t(), other.view(4), wide[:, ::2], torch._neg_view(other)):
            tensor.data = edited
            yield
        tensor.data = before
    nowhere = torch.zeros(2, 0, device="cpu", dtype=torch.int64)
    sparse = torch.sparse_coo_tensor(nowhere, other[0, :0], (2, 2), check_invariants=False)
    for new in (other.clone(), other.t(), param.detach(), state, None, sparse, other.clone()):
        param.grad = new
        yield
    param.grad = grad
    yield
