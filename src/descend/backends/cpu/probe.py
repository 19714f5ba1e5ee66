"""Proves that tables of addresses still describe the tensors they were made from.

Users swap a parameter's storage, replace gradients and transpose things in place; every address a kernel is given
must be true at that moment. Asking torch from Python takes about a microsecond a tensor; here one native call asks the
same questions through torch's C interface (the ``aoti_torch_*`` shims) and two C++ functions, at a few nanoseconds
each. For every parameter and its gradient it compares the address and a hash of dtype, device, layout, sign bit, sizes
and strides with what was recorded. A gradient that merely moved is no change: its new address is written into the
table, unless it now overlaps memory that the step writes.

A DTensor is watched through the tensor inside it. Its gradient is another DTensor, in which the native probe finds the
local gradient: from the TensorImpl to the Python object, and from there to what is inside. Where it cannot,
``distributed/local_params.py`` hands the local gradients over.

The native probe reads the ``at::Tensor`` inside each Python object and owns none: ``torch.utils.swap_tensors`` works,
and is noticed. Neither the C++ names nor the place of the ``at::Tensor`` is a stable interface. At first use they are
looked up, and a self-test compares the answers with those of ``PythonProbe``. If a name is missing or an answer differs
(or on systems other than Linux), ``PythonProbe`` is used: slower, but linear in the number of tensors as well.
"""

from __future__ import annotations

import ctypes
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cache
from operator import is_
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from descend.backends.cpu import library, object_files, threads
from descend.core.memory import PLAIN, has_address
from descend.core.update import Cell, Wrapper

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
_OBJECT_WORDS = 16  # the words of a TensorImpl that may hold the address of its Python object
_IS_VALID, _WRAPPERS, _SPECS = 9, 10, 11  # places in the arguments of the kernel
_COMPARED_FROM = 32  # objects; fewer are compared as fast one by one
_SHARED_FROM = 256  # tensors; below, waking a second thread costs more than it saves


class _Bindings(NamedTuple):
    """What the native probe needs to know of this torch.

    Attributes:
        functions: addresses of ``_SHIMS``, ``_IS_NEG`` and ``_GRAD``, in this order.
        tensor_offset: bytes from a Python tensor to the ``at::Tensor`` in it.
        type_offset: bytes from any Python object to the address of its class.
    """

    functions: np.ndarray
    tensor_offset: int
    type_offset: int


class NativeProbe:
    """Watches parameters, their gradients and state tensors.

    Args:
        bindings: to this torch.
        params: the parameters to watch; with ``wrappers``, plain tensors on the memory of inner tensors.
        cells: for each parameter, where its gradient's address is kept; None if no kernel reads it.
        state: state tensors, watched when ``revalidate(state=True)`` is asked.
        written: sorted, disjoint intervals of the addresses that the step writes, shape (n, 2).
        wrappers: for each parameter, the DTensor whose gradient it has, if any. Default: none has one.
    Attributes:
        unwraps: whether it reads the gradients of wrappers. Otherwise the parameters must have them.
    """

    def __init__(
        self,
        bindings: _Bindings,
        params: Sequence[Tensor],
        cells: Sequence[Cell | None],
        state: Sequence[Tensor],
        written: np.ndarray,
        wrappers: Sequence[Wrapper | None] = (),
    ) -> None:
        tensors = [*params, *state]
        self._params = len(params)
        self._rows = np.zeros((len(tensors), 12), np.int64)
        self._rows[:, 0] = [id(tensor) + bindings.tensor_offset for tensor in tensors]
        self._rows[:, 6] = _NO_TABLE
        self._rows[len(params) :, 6] = _STATE
        for row, param, cell in zip(self._rows, params, cells, strict=False):
            if cell is not None:
                row[5] = param.numel() * (param.grad.itemsize if param.grad is not None else 0)
                row[6] = cell.table.ctypes.data + cell.table.strides[0] * cell.row + 8
        starts, ends = (np.ascontiguousarray(column) for column in written.T)
        tables = bindings.functions, self._rows, starts, ends
        type_word = (bindings.type_offset - bindings.tensor_offset) // 8
        self._call = array("q", [*(table.ctypes.data for table in tables), len(written), type_word, 1, 0, 0, 1, 0, 1])
        self._kept_alive = tensors, cells, tables
        self._kernel, self._address = library.probe(), self._call.buffer_info()[0]
        self._run_alone = object_files.locked(self._kernel)
        self._wrapped = [i for i, wrapper in enumerate(wrappers) if wrapper is not None]
        facts = _facts_about([wrapper for wrapper in wrappers if wrapper is not None], bindings)
        self.unwraps = facts is not None and self._can_unwrap(facts, wrappers, bindings)
        self.revalidate(state=True)
        self._call[6] = 0  # it was recorded

    def _can_unwrap(self, facts: np.ndarray, wrappers: Sequence[Wrapper | None], bindings: _Bindings) -> bool:
        """Whether the gradients found inside those of wrappers are the ones that the parameters have."""
        self._held = facts, [wrapper for wrapper in wrappers if wrapper is not None]
        for row, wrapper in zip(self._rows, wrappers, strict=False):
            if wrapper is not None:
                row[0] = id(wrapper.inner) + bindings.tensor_offset
                row[7] = id(wrapper.param) + bindings.tensor_offset
                row[8:10] = id(wrapper.inner), id(wrapper.spec)
        self._call[_WRAPPERS] = facts.ctypes.data
        grads = [self._kept_alive[0][i].grad for i in self._wrapped]
        expected = [0 if grad is None else grad.data_ptr() for grad in grads]
        if self.revalidate(state=True) and expected == self._rows[self._wrapped, 3].tolist():
            return True
        self._call[_WRAPPERS] = 0
        self._rows[:, 7] = 0
        self._rows[self._wrapped, 0] = [id(self._kept_alive[0][i]) + bindings.tensor_offset for i in self._wrapped]
        return False

    def revalidate(self, state: bool, specs: bool = True) -> bool:
        """Whether all is as recorded. Addresses of moved gradients are updated.

        Args:
            state: whether to look at state tensors too.
            specs: whether the gradients of wrappers must be described by the same objects. Default: True.
        """
        call = self._call
        call[_SPECS] = specs
        call[7], call[8], call[_IS_VALID] = len(self._rows) if state else self._params, 0, 1
        # The interpreter lock is kept: nobody replaces a gradient while it is being looked at.
        if call[7] < _SHARED_FROM:
            self._run_alone(self._address)
        else:
            threads.run_locked(self._kernel, self._address)
        return bool(call[_IS_VALID])


class PythonProbe:
    """The same as ``NativeProbe``, in Python: slower, and the reference for its self-test."""

    unwraps = False

    def __init__(
        self, params: Sequence[Tensor], cells: Sequence[Cell | None], state: Sequence[Tensor], written: np.ndarray
    ) -> None:
        self._params, self._cells, self._state = params, cells, state
        self._starts, self._ends = written.T.tolist()
        self._seen = [_layout(param) for param in params]
        self._seen_grads = [_layout(param.grad) for param in params]
        self._seen_state = [_layout(tensor) for tensor in state]

    def revalidate(self, state: bool, specs: bool = True) -> bool:
        """Whether all is as recorded, state tensors too if ``state``. Addresses of moved gradients are updated."""
        if self._seen != [_layout(param) for param in self._params]:
            return False
        if state and self._seen_state != [_layout(tensor) for tensor in self._state]:
            return False
        grads = [_layout(param.grad) for param in self._params]
        moved = [i for i, (seen, grad) in enumerate(zip(self._seen_grads, grads, strict=True)) if seen != grad]
        for i in moved:
            if self._seen_grads[i][:-1] != grads[i][:-1] or self._is_written(self._params[i].grad):
                return False
        for i in moved:
            if (cell := self._cells[i]) is not None:
                cell.table[cell.row, 1] = grads[i][-1]
        self._seen_grads = grads
        return True

    def _is_written(self, grad: Tensor | None) -> bool:
        """Whether the step writes to some of its memory, or it has none."""
        if grad is None or not (start := grad.data_ptr()):
            return True
        first = bisect_right(self._ends, start)  # the first interval that ends behind its start
        return first < len(self._ends) and bool(self._starts[first] < start + grad.nbytes)


def _layout(tensor: Tensor | None) -> tuple[Any, ...]:
    """All that a table of addresses relies on; the address comes last."""
    if tensor is None:
        return (None,)
    device = tensor.is_cpu or tensor.device
    if tensor.layout != torch.strided:
        return (tensor.layout, tensor.dtype, device, None)  # what it holds is read at every step
    address = tensor.data_ptr() if has_address(tensor) else None
    return (type(tensor), tensor.dtype, device, tensor.is_neg(), tensor.shape, tensor.stride(), address)


def make_probe(
    params: Sequence[Tensor],
    cells: Sequence[Cell | None],
    state: Sequence[Tensor],
    written: np.ndarray,
    wrappers: Sequence[Wrapper | None] = (),
) -> NativeProbe | PythonProbe:
    """The fastest probe for these tensors on this torch."""
    if all(map(_is_plain, params)) and (bindings := _bindings()) is not None:
        return NativeProbe(bindings, params, cells, state, written, wrappers)
    return PythonProbe(params, cells, state, written)


def same_objects(listed: Sequence[Any], others: list[Any]) -> bool:
    """Whether two lists hold the same objects in the same order, whatever it means that these are equal."""
    if len(listed) != len(others):
        return False
    items = _place_of_items() if len(others) >= _COMPARED_FROM and type(listed) is list else None
    if items is None:
        return all(map(is_, listed, others))
    places = (ctypes.c_void_p.from_address(id(each) + items).value for each in (listed, others))
    return bool(_compare_memory()(*places, ctypes.sizeof(ctypes.c_void_p) * len(others)) == 0)


@cache
def _place_of_items() -> int | None:
    """Bytes from a list to the address of its items; None if that is not how this Python keeps them."""
    try:
        _compare_memory()
    except (OSError, AttributeError, TypeError):  # not Linux
        return None
    probe = [object() for _ in range(5)]
    for place in range(object.__basicsize__, list.__basicsize__, 8):
        address = ctypes.c_int64.from_address(id(probe) + place).value
        # An address of an object lies among others; sizes are small.
        if address > 2**16 and (ctypes.c_int64 * 5).from_address(address)[:] == [*map(id, probe)]:
            return place
    return None


@cache
def _compare_memory() -> Any:
    """``memcmp``; the interpreter lock is kept, so that nobody changes the lists."""
    compare = ctypes.PyDLL(None).memcmp
    compare.argtypes, compare.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_int
    return compare


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in PLAIN  # no kernel takes others; some have no address


@cache
def _bindings() -> _Bindings | None:
    """What the native probe needs; None if this torch lacks it, or if the answers would not be those of Python."""
    try:
        bindings = _look_up()
    except (OSError, AttributeError, ValueError):  # not Linux, or a torch that is built otherwise
        return None
    with torch.inference_mode(False), torch.no_grad():
        return bindings if _agrees_with_python(bindings) else None


def _look_up() -> _Bindings:
    folder = Path(torch.__file__).parent / "lib"
    torch_cpu, c10 = (ctypes.CDLL(str(folder / name)) for name in ("libtorch_cpu.so", "libc10.so"))
    functions = [getattr(torch_cpu, f"aoti_torch_{name}") for name in _SHIMS]
    functions += [getattr(torch_cpu, _IS_NEG), getattr(c10, _GRAD)]
    addresses = np.array([ctypes.cast(f, ctypes.c_void_p).value for f in functions], np.int64)
    tensor = torch.empty(0, device="cpu")
    header = (ctypes.c_int64 * (object.__basicsize__ // 8)).from_address(id(tensor))
    return _Bindings(addresses, tensor_offset(), 8 * header[:].index(id(Tensor)))


def tensor_offset() -> int:
    """Bytes from a Python tensor to the ``at::Tensor`` in it; ``ValueError`` if there is none."""
    tensor = torch.empty(0, device="cpu")
    words = (ctypes.c_int64 * (torch._C.TensorBase.__basicsize__ // 8)).from_address(id(tensor))
    # An at::Tensor is a pointer to its TensorImpl, whose address Python tells.
    return 8 * words[:].index(tensor._cdata, object.__basicsize__ // 8)


def _facts_about(wrappers: Sequence[Wrapper], bindings: _Bindings) -> np.ndarray | None:
    """What the kernel must know of wrappers; None if there are none, of several classes, or made otherwise."""
    classes = {(type(wrapper.param), type(wrapper.inner)) for wrapper in wrappers}
    if len(classes) != 1 or any(inner is not Tensor for _, inner in classes):
        return None
    wrapper, first = wrappers[0], bindings.tensor_offset // 8
    words = (ctypes.c_int64 * (type(wrapper.param).__basicsize__ // 8)).from_address(id(wrapper.param))[:]
    own_spec: Any = getattr(wrapper.param, "_spec", None)
    impl = (ctypes.c_int64 * _OBJECT_WORDS).from_address(wrapper.param._cdata)[:]
    try:
        inner, spec = words.index(id(wrapper.inner)) - first, words.index(id(own_spec)) - first
        owner = impl.index(id(wrapper.param))
    except ValueError:
        return None
    return np.array([id(type(wrapper.param)), id(Tensor), owner, inner, spec, bindings.tensor_offset], np.int64)


def _agrees_with_python(bindings: _Bindings) -> bool:
    """Whether both probes notice the same edits, and follow the same gradients."""
    param, state = (torch.zeros(2, 2, device="cpu", dtype=torch.float32) for _ in range(2))
    param.grad = torch.zeros_like(param)
    written = np.array([[tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes] for tensor in (param, state)])
    written.sort(axis=0)
    tables = np.zeros((2, 1, 2), np.int64)
    native = NativeProbe(bindings, [param], [Cell(tables[0], 0)], [state], written)
    python = PythonProbe([param], [Cell(tables[1], 0)], [state], written)
    for _ in _edits(param, state):
        is_valid = native.revalidate(state=True)
        if is_valid != python.revalidate(state=True) or (is_valid and tables[0, 0, 1] != tables[1, 0, 1]):
            return False
    return True


def _edits(param: Tensor, state: Tensor) -> Iterator[None]:
    """Yield after each edit; the last one undoes the others."""
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
    sparse = torch.sparse_coo_tensor(nowhere, other[0, :0], (2, 2), device="cpu", check_invariants=False)
    for new in (other.clone(), other.t(), param.detach(), state, None, sparse, other.clone()):
        param.grad = new
        yield
    param.grad = grad
    yield
