"""Proves that tables of addresses still describe the tensors they were made from.

Users swap a parameter's storage, replace gradients and transpose things in place; every address a kernel is given
must be true at that moment. Asking torch from Python costs about 0.5 us a tensor; here one native call asks the same
questions through torch's C interface (the ``aoti_torch_*`` shims) and, for ``.grad``, one C++ function, at a few
nanoseconds each. For every parameter and its gradient it compares the address and a hash of dtype, device, layout,
sign bit, sizes and strides with what was recorded. A gradient that merely moved is no change: its new address is
written into the table, unless it now overlaps memory that the step writes.

The C++ symbol names are not a stable interface, so this is done only with the torch releases it has been tested with;
with others ``PythonProbe`` asks the same questions slowly.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descend.backends.cpu import library
from descend.core.update import Cell

_TESTED = ("2.13.",)
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


class NativeProbe:
    """Watches parameters, their gradients and state tensors.

    Args:
        params: the parameters to watch.
        cells: for each parameter, where its gradient's address is kept; None if no kernel reads it.
        state: state tensors, watched when ``holds(state=True)`` is asked.
        written: sorted, disjoint intervals of the addresses that the step writes, shape (n, 2).
    """

    def __init__(
        self, params: Sequence[Tensor], cells: Sequence[Cell | None], state: Sequence[Tensor], written: np.ndarray
    ) -> None:
        self._delete, functions, self._run = _native()
        self._params = len(params)
        self._handles = np.array(_handles([*params, *state]), np.int64)
        self._rows = np.zeros((len(self._handles), 6), np.int64)
        self._rows[len(params) :, 4] = _STATE
        for row, param, cell in zip(self._rows, params, cells, strict=False):
            if cell is not None:
                row[4] = cell.table.ctypes.data + cell.table.strides[0] * cell.row + 8
                row[5] = param.numel() * (param.grad.itemsize if param.grad is not None else 0)
        self._cells = cells  # keeps the tables alive
        self._intervals = np.ascontiguousarray(written.T)
        self._scratch = np.zeros(1, np.int64)
        starts = self._intervals.ctypes.data
        self._call = np.array(
            [
                functions.ctypes.data,
                self._scratch.ctypes.data,
                1,
                self._handles.ctypes.data,
                self._rows.ctypes.data,
                len(self._handles),
                starts,
                starts + 8 * len(written),
                len(written),
                0,
            ],
            np.int64,
        )
        self._address = self._call.ctypes.data
        self._run(self._address)
        self._call[2] = 0

    def holds(self, state: bool) -> bool:
        """Whether all is as recorded; gradients that moved are followed. With ``state``, state tensors too."""
        self._call[5] = len(self._rows) if state else self._params
        self._call[9] = 0
        self._run(self._address)
        return bool(self._call[9])

    def __del__(self) -> None:
        for handle in getattr(self, "_handles", ()):
            self._delete(int(handle))


class PythonProbe:
    """The same questions, asked in Python."""

    def __init__(
        self, params: Sequence[Tensor], cells: Sequence[Cell | None], state: Sequence[Tensor], written: np.ndarray
    ) -> None:
        self._params, self._cells, self._state, self._written = params, cells, state, written
        self._seen = [_layout(p) + _layout(p.grad) for p in params]
        self._seen_state = [_layout(tensor) for tensor in state]

    def holds(self, state: bool) -> bool:
        """Whether all is as recorded; gradients that moved are followed. With ``state``, state tensors too."""
        moved = []
        for i, param in enumerate(self._params):
            seen, found = self._seen[i], _layout(param) + _layout(param.grad)
            if seen[:-1] != found[:-1]:
                return False
            if seen[-1] != found[-1]:
                start, end = found[-1], found[-1] + param.grad.numel() * param.grad.itemsize  # type: ignore[union-attr]
                if start == 0 or any(start < last and first < end for first, last in self._written):
                    return False
                moved.append((i, found))
        if state and self._seen_state != [_layout(tensor) for tensor in self._state]:
            return False
        for i, found in moved:
            self._seen[i] = found
            if (cell := self._cells[i]) is not None:
                cell.table[cell.row, 1] = found[-1]
        return True


def _layout(tensor: Tensor | None) -> tuple[Any, ...]:
    """All that a table of addresses relies on; the address comes last."""
    if tensor is None:
        return (None,)
    if tensor.layout != torch.strided:
        return (tensor.layout, tensor.dtype, tensor.device, None)  # what it holds is read at every step
    facts = (type(tensor), tensor.dtype, tensor.device, tensor.is_neg(), tensor.shape, tensor.stride())
    return (*facts, tensor.data_ptr() if tensor.device.type == "cpu" and _is_plain(tensor) else None)


def make_probe(
    params: Sequence[Tensor], cells: Sequence[Cell | None], state: Sequence[Tensor], written: np.ndarray
) -> NativeProbe | PythonProbe:
    """The fastest probe for these tensors on this torch."""
    kind = NativeProbe if _native() is not None and all(map(_is_plain, params)) else PythonProbe
    return kind(params, cells, state, written)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter)  # others no kernel takes; some have no address


def _handles(tensors: list[Tensor]) -> list[int]:
    """Owning ``at::Tensor*`` for each tensor."""
    capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(tensors)
    return [_pointer(capsule, None) for capsule in capsules]


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


@cache
def _native() -> Any:
    """What deletes a handle, torch's functions, and the probe itself; None for a torch not tested with."""
    if not torch.__version__.startswith(_TESTED):
        return None
    folder = Path(torch.__file__).parent / "lib"
    try:
        torch_cpu, c10 = (ctypes.CDLL(str(folder / name)) for name in ("libtorch_cpu.so", "libc10.so"))
        functions = [getattr(torch_cpu, f"aoti_torch_{name}") for name in _SHIMS]
        functions += [getattr(torch_cpu, _IS_NEG), getattr(c10, _GRAD)]
        delete = torch_cpu.aoti_torch_delete_tensor_object
    except (OSError, AttributeError):  # not Linux
        return None
    delete.argtypes, delete.restype = [ctypes.c_void_p], ctypes.c_int
    addresses = np.array([ctypes.cast(f, ctypes.c_void_p).value for f in functions], np.int64)
    # PYFUNCTYPE keeps the interpreter lock: nobody replaces a gradient while it is being looked at.
    return delete, addresses, ctypes.PYFUNCTYPE(None, ctypes.c_int64)(library.probe())
