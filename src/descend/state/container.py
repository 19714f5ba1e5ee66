"""The per-parameter state, and how an optimizer knows that nobody has touched it."""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from descend.backends.cpu.threads import serial_in_forked_child
from descend.backends.eager import as_real
from descend.core import memory
from descend.state import lazy_memory

STATE_DTYPES = (None, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _exposing(name: str) -> Callable[..., Any]:
    method = getattr(defaultdict, name)

    def exposing(self: State, *args: Any, **kwargs: Any) -> Any:
        self.exposed = True
        return method(self, *args, **kwargs)

    exposing.__name__, exposing.__doc__ = name, method.__doc__
    return exposing


class Initial(dict[str, Any]):
    """State made before the first step, which rules that count no steps would take for that of a later one."""


class State(defaultdict[Any, Any]):
    """``optimizer.state``: a ``defaultdict(dict)`` that remembers whether it ever let its content out.

    A state tensor that nobody else has seen cannot have been replaced or edited, so the next step need not look at
    it. Once anything was read or written from outside, every step looks at everything again. The optimizer itself
    reads through ``dict``'s own methods, which do not count.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.exposed = True
        self.owner: Callable[[], Any] = lambda: None

    @classmethod
    def owned_by(cls, optimizer: Any) -> State:
        """An empty state that only ``optimizer`` has seen."""
        state = cls(dict)
        state.exposed = False
        state.owner = weakref.ref(optimizer)
        return state

    def __reduce__(self) -> Any:
        return defaultdict, (dict, {key: copy.copy(value) for key, value in dict.items(self)})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """As ``deepcopy`` does it; what is zero in the state of embeddings costs the copy no memory either."""
        if getattr(self.owner(), "sparse", None) is not None:
            for found in dict.values(self):
                for tensor in found.values():
                    if isinstance(tensor, Tensor) and tensor.is_cpu and tensor.layout is torch.strided:
                        memo[id(tensor)] = lazy_memory.copied(tensor)
        return defaultdict(dict, deepcopy(dict(dict.items(self)), memo))

    def __copy__(self) -> Any:
        self.exposed = True
        return defaultdict(dict, dict.items(self))

    copy = __copy__

    __getitem__ = _exposing("__getitem__")
    __setitem__ = _exposing("__setitem__")
    __delitem__ = _exposing("__delitem__")
    __iter__ = _exposing("__iter__")
    __reversed__ = _exposing("__reversed__")
    __or__ = _exposing("__or__")
    __ror__ = _exposing("__ror__")
    __ior__ = _exposing("__ior__")
    clear = _exposing("clear")
    get = _exposing("get")
    items = _exposing("items")
    keys = _exposing("keys")
    pop = _exposing("pop")
    popitem = _exposing("popitem")
    setdefault = _exposing("setdefault")
    update = _exposing("update")
    values = _exposing("values")


def new_tensor(param: Tensor, dtype: torch.dtype, start: Any, lazy: bool = False) -> Tensor:
    """A state tensor in the memory order of ``param`` that starts as ``start``: a number, or a tensor like ``param``.

    Both parts of a complex number start as the number: a step treats them as two real ones. ``lazy``: zeros in lazily
    committed memory.
    """
    if lazy and param.is_cpu and param.is_contiguous() and not isinstance(start, Tensor) and start == 0:
        return lazy_memory.zeros(param.shape, dtype)
    with serial_in_forked_child():
        tensor = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        if isinstance(start, Tensor):
            start = as_real(start)
            as_real(tensor).copy_(start.reshape(()) if start.numel() == 1 else start)
        elif start != 0:
            as_real(tensor).fill_(start)
    return tensor


def state_tensors(
    optimizer: Any, param: Tensor, names: Sequence[str], found: Mapping[str, Any]
) -> list[tuple[str, Tensor]]:
    """The state tensors that exist of those called ``names``.

    Raises:
        RuntimeError: if one has not the parameter's shape, or its memory, the parameter's or the gradient's is gone;
            or if the parameter cannot hold what a step makes of it.
    """
    if not (param.is_floating_point() or param.is_complex()):
        raise RuntimeError(
            f"{type(optimizer).__name__}: a step makes fractions, which {optimizer.name_of(param)} cannot hold: it is "
            f"{param.dtype}. Nothing has moved."
        )
    state = [(name, found[name]) for name in names if isinstance(found.get(name), Tensor)]
    for name, tensor in state:
        if tensor.shape != param.shape:
            raise RuntimeError(
                f"{type(optimizer).__name__}: {name} of {optimizer.name_of(param)} has shape {tuple(tensor.shape)}, "
                f"expected {tuple(param.shape)}. Nothing has moved."
            )
    for name, tensor in (("it", param), ("its gradient", param.grad), *state):
        if tensor is not None and memory.is_freed(tensor):
            raise RuntimeError(
                f"{type(optimizer).__name__}: {optimizer.name_of(param)}: the memory of {name} has been freed "
                "(untyped_storage().resize_). Restore it before the step, or set the gradient to None."
            )
    return state


def stored_number(found: Mapping[str, Any], name: str, start: Any) -> Tensor:
    """A number of a state, a 0-dim tensor on the CPU as in torch; a new one if there is none that we can write."""
    value: Any = found.get(name)
    if _is_number(value):
        return value  # type: ignore[no-any-return]
    value = start if value is None else value
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return torch.as_tensor(value, dtype=dtype, device="cpu").reshape(()).clone()


def _is_number(value: Any) -> bool:
    """Whether the kernels can read and write it in place."""
    return (
        isinstance(value, Tensor)
        and value.numel() == 1
        and value.device.type == "cpu"
        and value.dtype in (torch.float32, torch.float64)
    )
