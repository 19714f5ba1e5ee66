"""Both probes notice the same edits, the native one is taken only if it does, and the one in Python is linear."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from descend.backends.cpu import probe, threads
from descend.backends.cpu.probe import Cell, NativeProbe, PythonProbe

native_only = pytest.mark.skipif(sys.platform != "linux", reason="the native probe needs Linux")
MANY = 300  # enough for two threads


def watched(count: int) -> tuple[list[Tensor], list[Tensor], np.ndarray]:
    """Parameters with gradients, state, and the sorted intervals of both but the gradients."""
    params = [torch.zeros(2, 3, requires_grad=True) for _ in range(count)]
    state = [torch.zeros(2, 3) for _ in params]
    for param in params:
        param.grad = torch.zeros(2, 3)
    written = np.array([[tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes] for tensor in (*params, *state)])
    return params, state, written[np.argsort(written[:, 0])]


def make(kind: Callable[..., Any], params: list[Tensor], state: list[Tensor], written: np.ndarray) -> Any:
    """A probe, and the table that it keeps."""
    table = np.zeros((len(params), 2), np.int64)
    return kind(params, [Cell(table, row) for row in range(len(params))], state, written), table


def of_this_torch(*rest: Any) -> NativeProbe:
    bindings = probe._bindings()
    assert bindings is not None
    return NativeProbe(bindings, *rest)


KINDS = [pytest.param(of_this_torch, id="native", marks=native_only), pytest.param(PythonProbe, id="python")]


def double(tensor: Tensor) -> None:
    tensor.data = tensor.data.double()


def move(tensor: Tensor) -> None:
    tensor.data = tensor.data.clone()


def transpose(tensor: Tensor) -> None:
    tensor.data = tensor.data.t()


def flip_sign_bit(tensor: Tensor) -> None:
    tensor.data = torch._neg_view(tensor.data)


def swap(tensor: Tensor) -> None:
    torch.utils.swap_tensors(tensor, torch.zeros_like(tensor))


class Marked(Tensor):
    pass


def mark(tensor: Tensor) -> None:
    tensor.__class__ = Marked


@pytest.mark.parametrize("edit", [double, move, transpose, flip_sign_bit, swap, mark], ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_any_one_tensor_that_is_edited_is_noticed(kind: Callable[..., Any], edit: Callable[[Tensor], None]) -> None:
    params, state, written = watched(MANY)
    for tensor in (params[0], params[64], params[-1], state[70], state[-1]):
        found, _ = make(kind, params, state, written)
        assert found.revalidate(state=True)
        edit(tensor)
        assert not found.revalidate(state=True)
        assert found.revalidate(state=False) is any(tensor is one for one in state)


@pytest.mark.parametrize("edit", [double, transpose, flip_sign_bit], ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_another_layout_is_noticed(kind: Callable[..., Any], edit: Callable[[Tensor], None]) -> None:
    params, state, written = watched(MANY)
    for param in (params[0], params[64], params[-1]):
        found, _ = make(kind, params, state, written)
        assert param.grad is not None
        edit(param.grad)
        assert not found.revalidate(state=False)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_that_comes_or_goes_is_noticed(kind: Callable[..., Any]) -> None:
    params, state, written = watched(3)
    grad, params[1].grad = params[1].grad, None
    found, _ = make(kind, params, state, written)
    params[1].grad = grad
    assert not found.revalidate(state=False)
    found, _ = make(kind, params, state, written)
    params[1].grad = None
    assert not found.revalidate(state=False)


@pytest.mark.parametrize("threads_used", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_move_are_followed(kind: Callable[..., Any], threads_used: int) -> None:
    torch.set_num_threads(threads_used)
    params, state, written = watched(MANY)
    found, table = make(kind, params, state, written)
    before = [param.grad for param in params]
    for param in params:
        param.grad = torch.zeros(2, 3)
    assert found.revalidate(state=False)
    assert table[:, 1].tolist() == [param.grad.data_ptr() for param in params]
    assert len(before) == MANY  # the old ones were alive: every gradient has moved


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_moved_onto_written_memory_is_noticed(kind: Callable[..., Any]) -> None:
    memory = torch.zeros(200)
    parts = [memory[start : start + 6].view(2, 3) for start in range(4, 180, 16)]  # with gaps of ten numbers
    params = [part.detach().requires_grad_() for part in parts]
    written = np.array([[part.data_ptr(), part.data_ptr() + part.nbytes] for part in parts])
    for start in range(194):
        for param in params:
            param.grad = torch.zeros(2, 3)
        found, _ = make(kind, params, [], written)
        params[3].grad = memory[start : start + 6].view(2, 3)
        meets = any(4 + 16 * part < start + 6 and start < 10 + 16 * part for part in range(len(parts)))
        assert found.revalidate(state=False) is not meets, start


@native_only
def test_native_probe_does_not_keep_tensors_from_being_swapped() -> None:
    params, state, written = watched(2)
    _found, _ = make(of_this_torch, params, state, written)
    assert [tensor._use_count() for tensor in (*params, *state)] == [1, 1, 1, 1]


@native_only
@pytest.mark.parametrize("function", ["is_defined", "get_dtype", "get_dim", "get_sizes", "get_data_ptr", probe._IS_NEG])
def test_self_test_notices_a_function_that_does_nothing(function: str) -> None:
    bindings = probe._bindings()
    assert bindings is not None
    nothing = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(lambda tensor, result: 0)
    functions = bindings.functions.copy()
    functions[[*probe._SHIMS, probe._IS_NEG].index(function)] = ctypes.cast(nothing, ctypes.c_void_p).value
    assert probe._agrees_with_python(bindings)
    assert not probe._agrees_with_python(bindings._replace(functions=functions))


@pytest.mark.parametrize("missing", ["_GRAD", "_IS_NEG", "_SHIMS"])
def test_python_probe_is_taken_where_a_function_is_missing(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, missing, ("no_such_function",) if missing == "_SHIMS" else "no_such_function")
    assert probe._bindings.__wrapped__() is None


def events(action: Callable[[], object]) -> int:
    """Calls that the interpreter makes, and generators that it resumes."""
    count = 0

    def note(*_: object) -> None:
        nonlocal count
        count += 1

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def test_python_probe_is_linear_in_the_number_of_tensors() -> None:
    counts = []
    for count in (50, 100):
        params, state, written = watched(count)
        found, _ = make(PythonProbe, params, state, written)
        before = [param.grad for param in params]
        for param in params:
            param.grad = torch.zeros(2, 3)
        counts.append(events(lambda found=found: found.revalidate(state=True)))
        assert len(before) == count
    assert counts[1] <= 2 * counts[0]


def test_forked_child_probes_on_its_own_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads._openmp, "parallel_locked", None)  # as after a fork
    params, state, written = watched(MANY)
    found, _ = make(probe.make_probe, params, state, written)
    assert found.revalidate(state=True)
    params[-1].data = params[-1].data.clone()
    assert not found.revalidate(state=True)


@native_only
def test_the_self_test_passes_with_another_default_device() -> None:
    bindings = probe._bindings()
    assert bindings is not None
    with torch.device("meta"):
        assert probe._agrees_with_python(bindings)


@pytest.mark.parametrize("count", [0, 1, 31, 32, 1000])
def test_lists_are_compared_object_by_object(count: int) -> None:
    objects = [torch.zeros(()) for _ in range(count)]
    assert probe.same_objects([*objects], objects)
    assert probe.same_objects(tuple(objects), objects)
    assert not probe.same_objects([*objects, torch.zeros(())], objects)
    for place in {0, count // 2, count - 1} if count else ():
        other = [*objects]
        other[place] = torch.zeros(())  # equal, but not the same
        assert not probe.same_objects(other, objects)


def test_lists_are_compared_where_their_items_cannot_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_place_of_items", lambda: None)
    objects = [object() for _ in range(100)]
    assert probe.same_objects([*objects], objects)
    assert not probe.same_objects([*objects[:-1], object()], objects)


def test_items_of_lists_are_found_on_linux() -> None:
    assert (probe._place_of_items() is not None) == sys.platform.startswith("linux")
